"""A model's shapes, run once: what stands and falls together in it, and whether it runs when some of that is gone."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.families.streams import Channels, channels
from vitprune.groups import Group, cut_to, frame
from vitprune.modes import evaluating

Shapes = tuple[tuple[str, torch.Size], ...]

_SEEN: WeakKeyDictionary[nn.Module, tuple[Shapes, list[Channels]]] = WeakKeyDictionary()


def seen(model: nn.Module) -> list[Channels]:
    """All sets of channels of a timm model at its own image size; known until its shapes change.

    Raises:
        BadInput: it does not run without values.
    """
    shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
    known = _SEEN.get(model)
    if known is None or known[0] != shapes:
        small = frame(model)
        try:
            found = channels(small, _images(small))
        except Exception as error:  # whatever a forward pass says to tensors without values
            raise BadInput(f"{type(model).__name__}: it does not run on shapes alone ({_line(error)})") from None
        _SEEN[model] = known = shapes, found
    return known[1]


def attempt(model: nn.Module, groups: Sequence[Group], what: str) -> None:
    """Cut a third of every group from a copy of the model's shapes and run it.

    Raises:
        BadInput: it does not run; `what` says what has become narrower.
    """
    small = frame(model)
    try:
        for group in groups:
            cut_to(small, group, (group.units - group.units // 3,))
        with torch.no_grad(), evaluating(small):
            small(_images(small))
    except Exception as error:
        raise BadInput(f"{type(model).__name__}: with {what} it does not run ({_line(error)})") from None


def _images(model: nn.Module) -> Tensor:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(1, *get_model_input_config(model)["input_size"], dtype=dtype, device="meta")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
