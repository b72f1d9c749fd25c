"""Compare two models: classes and attributes of all modules, and logits in float64."""

import copy
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.tracing.fingerprint import fingerprint
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.outputs import main_tensor

TOLERANCE = 1e-9  # of logits in float64, relative: above rounding errors, below the effect of another LayerNorm eps
# attributes without effect on the logits in evaluation mode
WITHOUT_EFFECT = {"pretrained_cfg", "default_cfg", "feature_info", "grad_checkpointing", "_model_args"}


def first_difference(model: nn.Module, other: nn.Module) -> str:
    """Return the first difference of class or attributes of two models, in words; empty if there is none.

    Models whose forward pass is not determined by classes and attributes, such as those with hooks, differ.
    """
    ours, theirs = fingerprint(model), fingerprint(other)
    if ours is None or theirs is None:
        return f"{type(model).__name__}: has hooks or unknown attributes, and its logits differ after loading"
    return next(_differences(ours, theirs), "")


def _differences(ours: Hashable, theirs: Hashable) -> Iterator[str]:
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    for (path, kind, values), (_, other_kind, other_values) in zip(ours, theirs, strict=False):
        name = f"{path or kind.__name__}"
        if kind is not other_kind:
            yield f"{name}: is {kind.__name__}, timm builds {other_kind.__name__}"
        mine, others = dict(values), dict(other_values)
        for key in sorted(mine.keys() | others.keys()):
            if key not in WITHOUT_EFFECT and _without_lists(mine.get(key)) != _without_lists(others.get(key)):
                yield f"{name}.{key}: differs from the model that timm builds"
    if len(ours) != len(theirs):
        yield "the model has other modules than the model that timm builds"


def _without_lists(value: Hashable) -> Hashable:
    """Return a frozen value with lists as tuples: config.json has only lists."""
    if isinstance(value, tuple):
        return tuple(tuple if item is list else _without_lists(item) for item in value)
    return value


def same_logits(model: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Return whether two models give the same logits in float64 on the CPU.

    Args:
        model: A model.
        other: Another one.
        images: Their input.

    Returns:
        False also if one of them does not run.
    """
    try:
        first, second = (_logits(copy.deepcopy(network), images.cpu()) for network in (model, other))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a forward pass may raise anything
        return False
    return first.shape == second.shape and bool((first - second).abs().max() <= TOLERANCE * (1 + first.abs().max()))


def _logits(model: Any, images: Tensor) -> Tensor:
    model.cpu()
    with torch.inference_mode(False), torch.no_grad(), eval_mode(model):
        if images.is_floating_point():
            weights, images = model.state_dict(), images.double()
            model.float()(images.float())  # some modules, as ConViT's, make buffers of this type in their first pass
            model.double().load_state_dict(weights, strict=False)  # float rounds weights in float64
        output: Tensor = main_tensor(model.double()(images))
    return output
