"""Outputs of a model: a tensor, several of them, or the output object of another library."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.runtime.wrappers import plain_model

LOGITS = ("logits", "out")  # of transformers' classifiers and torchvision's segmenters
FEATURES = ("last_hidden_state",)  # of encoders
FEATURE_SCALE = 0.5  # root mean square of a token's features as logits; smaller is closer to the cosine distance


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield all tensors of a model's output, also those inside lists, mappings and output objects."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def main_tensor(output: Any) -> Any:
    """Return the tensor of an output that answers: logits, a map, or features, of a tuple the first tensor.

    Any other output is returned itself.
    """
    if isinstance(output, tuple):
        return next(tensors_of(output), output)
    if not isinstance(output, Mapping):
        return output
    named = next((output[name] for name in LOGITS + FEATURES if isinstance(output.get(name), Tensor)), None)
    return next(tensors_of(output), output) if named is None else named


def as_logits(output: Any) -> Any:
    """Return logits whose KL divergence measures the distance of two outputs.

    Logits (B, classes) and named logits are returned themselves. Tokens (B, N, C) and maps (B, C, H, W) become one
    distribution per position: over the channels, after a division by their root mean square, so that for small changes
    the divergence is about proportional to the cosine distance. A map of one channel becomes two classes. Any other
    output is returned itself.
    """
    value = main_tensor(output)
    if not isinstance(value, Tensor):
        return value
    is_named = isinstance(output, Mapping) and any(output.get(name) is value for name in LOGITS)
    if value.dim() == 4:
        value = value.flatten(2).transpose(1, 2)  # (B, positions, C)
        if value.shape[-1] == 1:
            return torch.cat([value, torch.zeros_like(value)], dim=-1)
    if value.dim() != 3 or is_named:
        return value
    return FEATURE_SCALE * value / value.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)


def return_logits(model: nn.Module) -> nn.Module:
    """Make a model return `as_logits` of its output, in place, and return the model."""
    if answer not in model._forward_hooks.values():
        model.register_forward_hook(answer)
    return model


def return_output(model: nn.Module) -> nn.Module:
    """Undo `return_logits`, in place, and return the model."""
    for number, hook in [*model._forward_hooks.items()]:
        if hook is answer:
            del model._forward_hooks[number]
    return model


def require_classifier(model: nn.Module, remedy: str) -> None:
    """Refuse a timm model whose output is features, which a cross-entropy with labels would take for logits.

    Args:
        model: The model.
        remedy: What to do, for the message.

    Raises:
        BadInput: its number of classes is 0.
    """
    plain = plain_model(model)
    if getattr(plain, "num_classes", None) == 0:
        raise BadInput(f"{type(plain).__name__}: has no classifier (num_classes is 0) for the labels; {remedy}")


@contextmanager
def returning_logits(*models: nn.Module) -> Iterator[None]:
    """Let models return `as_logits` of their outputs while the context is open; those that already do continue to."""
    changed = [model for model in models if answer not in model._forward_hooks.values()]
    for model in changed:
        return_logits(model)
    try:
        yield
    finally:
        for model in changed:
            return_output(model)


def answer(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return the logits of an output: a forward hook."""
    return as_logits(output)
