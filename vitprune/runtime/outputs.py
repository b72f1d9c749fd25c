"""Outputs of a model: a tensor, several of them, or the output object of another library."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

NAMES = ("logits", "out", "last_hidden_state")  # of transformers' classifiers, torchvision's segmenters, encoders


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
    """Return the tensor of a mapping that answers: logits, a map, or features; any other output is returned itself."""
    if not isinstance(output, Mapping):
        return output
    named = next((output[name] for name in NAMES if isinstance(output.get(name), Tensor)), None)
    return next(tensors_of(output), output) if named is None else named


def return_main_tensor(model: nn.Module) -> nn.Module:
    """Make a model return its main tensor instead of a mapping, in place, and return the model."""
    if answer not in model._forward_hooks.values():
        model.register_forward_hook(answer)
    return model


def return_all(model: nn.Module) -> nn.Module:
    """Undo `return_main_tensor`, in place, and return the model."""
    for number, hook in [*model._forward_hooks.items()]:
        if hook is answer:
            del model._forward_hooks[number]
    return model


def answer(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return the main tensor of an output: a forward hook."""
    return main_tensor(output)
