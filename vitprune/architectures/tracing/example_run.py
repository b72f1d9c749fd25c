"""Run a copy of a model on an example input: on the meta device, or with values if its forward pass needs them."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitprune.architectures.tracing.meta_operations import RememberedShapes
from vitprune.errors import BadInput
from vitprune.groups import meta_copy
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.input_size import input_size
from vitprune.runtime.messages import first_line

Result = TypeVar("Result")


class NotRunningError(BadInput):
    """A model does not run on its example; `reason` is the error of its forward pass."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def with_example(model: nn.Module, function: Callable[[nn.Module, Tensor], Result]) -> Result:
    """Call a function with a copy of a model and an input of its size.

    Args:
        model: The model; it is not changed.
        function: Is called with a copy and an input (1, C, H, W), both on the meta device; if it raises an error, as a
            forward pass does that reads values, again with a copy on the CPU and noise.

    Returns:
        The result of the function.

    Raises:
        NotRunningError: the model does not run.
    """
    without_values = meta_copy(model)
    try:
        return function(without_values, meta_input(without_values))
    except Exception as error:  # a forward pass may raise anything on tensors without values
        reason = first_line(error)
    state = model.state_dict()
    if not state or any(tensor.is_meta for tensor in state.values()):
        raise NotRunningError(f"{type(model).__name__}: it does not run on the meta device ({reason})", reason)
    shape = meta_input(model)
    try:
        with torch.inference_mode(False):
            noise = torch.randn(shape.shape, generator=torch.Generator().manual_seed(0)).to(shape.dtype)
            return function(copy.deepcopy(model).cpu(), noise)
    except Exception as error:
        name, size, reason = type(model).__name__, " x ".join(map(str, shape.shape[1:])), first_line(error)
        message = f"{name}: it does not run on images of {size} ({reason}); give example_input"
        raise NotRunningError(message, reason) from None


def run_once(model: nn.Module, inputs: Tensor) -> Any:
    """Return the output of a model in evaluation mode, without gradients.

    Args:
        model: The model.
        inputs: Its input.
    """
    with torch.no_grad(), eval_mode(model), RememberedShapes():
        return model(inputs)


def meta_input(model: nn.Module) -> Tensor:
    """Return an input on the meta device: an image (1, C, H, W), or tokens (1, T) for a causal language model."""
    context = getattr(model, "pretrained_cfg", {}).get("context_length")
    if context:
        return torch.empty(1, context, dtype=torch.int64, device="meta")
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
    return torch.empty(1, *input_size(model), dtype=dtype, device="meta")
