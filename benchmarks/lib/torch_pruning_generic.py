"""Torch-Pruning's generic recipe on one model: does the model run after 50 % of its channels are pruned?

MagnitudePruner with group magnitude importance, the classifier ignored, and the number of heads given for every Linear
or Conv2d layer of queries, keys and values that is a child of a module with a number of heads. One forward pass after
the pruning; if it fails, another one after the sizes that attention modules commonly store have been set.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.runtime.messages import first_line
from vitprune.runtime.outputs import main_tensor

RATIO = 0.5
PROJECTIONS = ("qkv", "q", "k", "v", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "to_qkv")
HEADS = ("num_heads", "num_attention_heads", "n_heads")
WORDS = 8  # of an error that are shown


def verdict(model: nn.Module, images: Tensor) -> str:
    """Return "works", "works once sizes are reset", or "fails: " with the first words of the error.

    Args:
        model: The model; it is pruned in place.
        images: Images (B, C, H, W).
    """
    tp: Any = importlib.import_module("torch_pruning")
    model = model.float().eval()
    images = images.float()
    before = sum(parameter.numel() for parameter in model.parameters())
    heads = dict(_heads(model))
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or ("classifier", "heads", "head")
    paths = (classifiers,) if isinstance(classifiers, str) else classifiers
    modules = dict(model.named_modules())
    try:
        pruner = tp.pruner.MagnitudePruner(
            model,
            images,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=[modules[path] for path in paths if path in modules],
            num_heads=heads,
            output_transform=main_tensor,
        )
        pruner.step()
    except Exception as error:  # any exception is the verdict
        return _failure(error)
    if sum(parameter.numel() for parameter in model.parameters()) == before:
        return "fails: nothing is pruned"
    error = _error(model, images)
    if error is None:
        return "works"
    for module in model.modules():
        layer = next((child for child in module.children() if child in heads), None)
        if layer is not None:
            _reset(module, layer, pruner.num_heads.get(layer, heads[layer]))
    return "works once sizes are reset" if _error(model, images) is None else _failure(error)


def _heads(model: nn.Module) -> Any:
    for module in model.modules():
        number = next((value for name in HEADS if isinstance(value := getattr(module, name, None), int)), 0)
        for name, layer in module.named_children():
            if number and name in PROJECTIONS and isinstance(layer, nn.Linear | nn.Conv2d):
                yield layer, number


def _reset(module: Any, layer: Any, heads: int) -> None:
    rows = layer.weight.shape[0] // (3 if "qkv" in [name for name, child in module.named_children()] else 1)
    values = {**dict.fromkeys(HEADS, heads), "head_dim": rows // heads, "attention_head_size": rows // heads}
    values |= {"attn_dim": rows, "all_head_size": rows, "embed_dim": rows}
    for name, value in values.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _error(model: nn.Module, images: Tensor) -> Exception | None:
    try:
        with torch.no_grad():
            finite = bool(main_tensor(model(images)).isfinite().all())
    except Exception as error:
        return error
    return None if finite else ValueError("the output is not finite")


def _failure(error: Exception) -> str:
    words = first_line(error).split()
    return f"fails: {' '.join(words[:WORDS]) or type(error).__name__}".replace("|", "/")
