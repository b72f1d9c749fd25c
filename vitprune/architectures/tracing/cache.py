"""Cached channel-dependency trace of a model, and a trial run of a pruned copy on the meta device."""

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
class _CacheEntry:
    """The trace of a model at these shapes, and the error of each trial run by group names (empty: it ran)."""

    shapes: Shapes
    groups: list[ChannelGroup]
    trials: dict[tuple[str, ...], str] = field(default_factory=dict)


_CACHE: WeakKeyDictionary[nn.Module, _CacheEntry] = WeakKeyDictionary()


def traced_channels(model: nn.Module) -> list[ChannelGroup]:
    """Return the groups of coupled channels of a model at its configured input size, cached until its shapes change.

    Raises:
        BadInput: the model does not run on the meta device.
    """
    return _entry(model).groups


def trial_run(model: nn.Module, groups: Sequence[Group], what: str) -> None:
    """Remove a third of every group from a copy of the model on the meta device, and run it; cached.

    Args:
        model: the model; it is not changed.
        groups: groups of one-dimensional shape.
        what: description of the removed units for the error message.

    Raises:
        BadInput: the pruned copy does not run.
    """
    trials, names = _entry(model).trials, tuple(group.name for group in groups)
    if names not in trials:
        trials[names] = _trial_error(model, groups)
    if trials[names]:
        raise BadInput(f"{type(model).__name__}: with {what} it does not run ({trials[names]})")


def _entry(model: nn.Module) -> _CacheEntry:
    shapes = state_shapes(model)
    entry = _CACHE.get(model)
    if entry is None or entry.shapes != shapes:
        copy = meta_copy(model)
        try:
            groups = channel_groups(copy, meta_input(copy))
        except Exception as error:  # a forward pass may raise anything on tensors without values
            raise BadInput(
                f"{type(model).__name__}: it does not run on the meta device ({first_line(error)})"
            ) from None
        _CACHE[model] = entry = _CacheEntry(shapes, groups)
    return entry


def _trial_error(model: nn.Module, groups: Sequence[Group]) -> str:
    copy = meta_copy(model)
    try:
        for group in groups:
            resize_group(copy, group, (group.units - group.units // 3,))
        with torch.no_grad(), eval_mode(copy):
            copy(meta_input(copy))
    except Exception as error:
        return first_line(error)
    return ""


def state_shapes(model: nn.Module) -> Shapes:
    """Return name and shape of every tensor in a model's state."""
    return tuple((name, tensor.shape) for name, tensor in model.state_dict().items())


def meta_input(model: nn.Module) -> Tensor:
    """Return an input on the meta device: an image (1, C, H, W), or tokens (1, T) for a causal language model."""
    context = getattr(model, "pretrained_cfg", {}).get("context_length")
    if context:
        return torch.empty(1, context, dtype=torch.int64, device="meta")
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(1, *get_model_input_config(model)["input_size"], dtype=dtype, device="meta")


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
