"""Torch-Pruning's generic recipe for transformers on one timm model: does the pruned model run?

Magnitude, 30 % of all channels, the classifier ignored, heads given for layers named qkv. One forward pass afterwards,
and another one after correcting the sizes that timm's attention modules store. Prints JSON.
"""

import argparse
import json

import timm
import torch
from torch import nn

from benchmarks.accuracy.torch_pruning import library

RATIO = 0.3


def main() -> None:
    """Prune the model and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a timm model")
    torch.set_num_threads(1)
    print(json.dumps(verdict(parser.parse_args().model)))


def verdict(name: str) -> str:
    """Return the result for a model: runs, runs once sizes are reset, forward fails, or pruner raises."""
    tp = library()
    model = timm.create_model(name).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    before = sum(parameter.numel() for parameter in model.parameters())
    heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Linear)}
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    try:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        ignored = [model.get_submodule(path) for path in classifiers]
        pruner = tp.pruner.BasePruner(
            model, images, importance=importance, pruning_ratio=RATIO, ignored_layers=ignored, num_heads=heads
        )
        pruner.step()
    except Exception as error:  # any exception is the verdict
        return f"pruner raises {type(error).__name__}"
    if sum(parameter.numel() for parameter in model.parameters()) == before:
        return "nothing is pruned"
    if _runs(model, images):
        return "runs"
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            module.num_heads = pruner.num_heads.get(module.qkv, module.num_heads)
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
    return "runs once sizes are reset" if _runs(model, images) else "forward fails"


def _runs(model: nn.Module, images: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            return bool(model(images).isfinite().all())
    except Exception:
        return False


if __name__ == "__main__":
    main()
