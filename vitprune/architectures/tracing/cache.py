"""Cached channel-dependency trace of a model, and a trial run of a pruned copy on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.architectures.tracing.attention_heads import AttentionTrace, trace_attention
from vitprune.architectures.tracing.dependency_graph import ChannelGroup, channel_groups
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.errors import BadInput
from vitprune.groups import Group, meta_copy, resize_group
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.input_size import input_size
from vitprune.runtime.messages import first_line


@dataclass(frozen=True)
class _CacheEntry:
    """The trace of a model, that of its heads if it was asked for, and the error of each trial run (empty: it ran)."""

    groups: list[ChannelGroup]
    attention: list[AttentionTrace] = field(default_factory=list)
    trials: dict[tuple[str, ...], str] = field(default_factory=dict)


_CACHE: StructureCache[_CacheEntry] = StructureCache()
_END_LAYERS: StructureCache[list[str]] = StructureCache()


def traced_channels(model: nn.Module) -> list[ChannelGroup]:
    """Return the groups of coupled channels of a model at its own input size, cached for models of the same structure.

    Raises:
        BadInput: the model does not run on the meta device.
    """
    return _CACHE.value_for(model, _trace).groups


def traced_attention(model: nn.Module) -> AttentionTrace:
    """Return the attention heads of a model and their channels, cached for models of the same structure.

    Raises:
        BadInput: the model does not run on the meta device.
    """
    entry = _CACHE.value_for(model, _trace)
    if not entry.attention:
        copy = meta_copy(without_merging(model))
        entry.attention.append(trace_attention(copy, meta_input(copy)))
    return entry.attention[0]


def trial_run(model: nn.Module, groups: Sequence[Group], what: str) -> None:
    """Remove a third of every group from a copy of the model on the meta device, and run it; cached.

    Args:
        model: the model; it is not changed.
        groups: groups of one-dimensional shape.
        what: description of the removed units for the error message.

    Raises:
        BadInput: the pruned copy does not run.
    """
    trials, names = _CACHE.value_for(model, _trace).trials, tuple(group.name for group in groups)
    if names not in trials:
        trials[names] = _trial_error(model, groups)
    if trials[names]:
        raise BadInput(f"{type(model).__name__}: with {what} it does not run ({trials[names]})")


def _trace(model: nn.Module) -> _CacheEntry:
    copy = meta_copy(without_merging(model))
    try:
        return _CacheEntry(channel_groups(copy, meta_input(copy)))
    except Exception as error:  # a forward pass may raise anything on tensors without values
        raise BadInput(f"{type(model).__name__}: it does not run on the meta device ({first_line(error)})") from None


def _trial_error(model: nn.Module, groups: Sequence[Group]) -> str:
    copy = meta_copy(model)
    try:
        for group in groups:
            resize_group(copy, group, (group.units - group.units // 3,))
    except Exception as error:
        return first_line(error)
    return shape_error(copy)


def shape_error(model: nn.Module) -> str:
    """Return the error of a run of the model's copy on the meta device, at its own input size; empty if it runs."""
    copy = meta_copy(model)
    try:
        with torch.no_grad(), eval_mode(copy):
            copy(meta_input(copy))
    except Exception as error:  # a forward pass may raise anything
        return first_line(error)
    return ""


def end_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that read the image and that return the output, in a run on the meta device.

    Raises:
        BadInput: the model does not run on the meta device.
    """
    return _END_LAYERS.value_for(model, _find_end_layers)


def _find_end_layers(model: nn.Module) -> list[str]:
    copy = meta_copy(model)
    calls: list[tuple[str, Tensor]] = []

    def record(path: str, output: Tensor) -> None:
        calls.append((path, output))

    for path, layer in copy.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, output, path=path: record(path, output))
    try:
        with torch.no_grad(), eval_mode(copy):
            output = copy(meta_input(copy))
    except Exception as error:  # a forward pass may raise anything on tensors without values
        raise BadInput(f"{type(model).__name__}: it does not run on the meta device ({first_line(error)})") from None
    outputs = output if isinstance(output, list | tuple) else [output]
    return [path for path, value in calls[:1]] + [
        path for path, value in calls[1:] if value.dim() == 2 and any(value is one for one in outputs)
    ]


def meta_input(model: nn.Module) -> Tensor:
    """Return an input on the meta device: an image (1, C, H, W), or tokens (1, T) for a causal language model."""
    context = getattr(model, "pretrained_cfg", {}).get("context_length")
    if context:
        return torch.empty(1, context, dtype=torch.int64, device="meta")
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(1, *input_size(model), dtype=dtype, device="meta")
