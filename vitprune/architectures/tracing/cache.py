"""A model's shapes, run once: what stands and falls together in it, and whether it runs when some of that is gone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from vitprune.architectures.tracing.dependency_graph import ChannelGroup, channel_groups
from vitprune.errors import BadInput
from vitprune.groups import Group, meta_copy, resize_group
from vitprune.runtime.eval_mode import eval_mode

Shapes = tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True)
class _Known:
    """What is known of a model of these shapes: its sets of channels, and why trial cuts failed, empty if they ran."""

    shapes: Shapes
    found: list[ChannelGroup]
    tried: dict[tuple[str, ...], str] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def traced_channels(model: nn.Module) -> list[ChannelGroup]:
    """All sets of channels of a timm model at its own image size; known until its shapes change.

    Raises:
        BadInput: it does not run without values.
    """
    return _known(model).found


def trial_run(model: nn.Module, groups: Sequence[Group], what: str) -> None:
    """Cut a third of every group from a copy of the model's shapes and run it; once, until its shapes change.

    Raises:
        BadInput: it does not run; `what` says what has become narrower.
    """
    tried, names = _known(model).tried, tuple(group.name for group in groups)
    if names not in tried:
        tried[names] = _failure(model, groups)
    if tried[names]:
        raise BadInput(f"{type(model).__name__}: with {what} it does not run ({tried[names]})")


def _known(model: nn.Module) -> _Known:
    state = shapes(model)
    known = _KNOWN.get(model)
    if known is None or known.shapes != state:
        small = meta_copy(model)
        try:
            found = channel_groups(small, images(small))
        except Exception as error:  # whatever a forward pass says to tensors without values
            raise BadInput(f"{type(model).__name__}: it does not run on shapes alone ({line(error)})") from None
        _KNOWN[model] = known = _Known(state, found)
    return known


def _failure(model: nn.Module, groups: Sequence[Group]) -> str:
    small = meta_copy(model)
    try:
        for group in groups:
            resize_group(small, group, (group.units - group.units // 3,))
        with torch.no_grad(), eval_mode(small):
            small(images(small))
    except Exception as error:
        return line(error)
    return ""


def shapes(model: nn.Module) -> Shapes:
    """Name and shape of everything in a model's state."""
    return tuple((name, tensor.shape) for name, tensor in model.state_dict().items())


def images(model: nn.Module) -> Tensor:
    """An image (1, C, H, W) of a model's own size, without values."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(1, *get_model_input_config(model)["input_size"], dtype=dtype, device="meta")


def line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
