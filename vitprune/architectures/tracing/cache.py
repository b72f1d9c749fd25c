"""Cached channel-dependency trace of a model, and a trial run of a pruned copy on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.architectures.tracing.attention_heads import AttentionTrace, trace_attention
from vitprune.architectures.tracing.dependency_graph import ChannelGraph, ChannelGroup, run_trace
from vitprune.architectures.tracing.example_run import NotRunningError, with_example
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.architectures.tracing.meta_operations import RememberedShapes
from vitprune.architectures.tracing.trace import Trace
from vitprune.errors import BadInput
from vitprune.groups import Group, meta_copy, resize_group
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.messages import first_line
from vitprune.runtime.outputs import tensors_of


@dataclass(frozen=True)
class _CacheEntry:
    """Groups of a model, its trace until its heads are found, its heads, error of each trial run (empty: it ran)."""

    groups: list[ChannelGroup]
    trace: list[Trace]
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
        find = partial(trace_attention, trace=entry.trace[0])
        entry.attention.append(with_example(without_merging(model), find))
        entry.trace.clear()  # it is large
    return entry.attention[0]


def trial_run(model: nn.Module, groups: Sequence[Group], what: str, how: str = "") -> None:
    """Remove a third of every group from a copy of the model on the meta device, and run it; cached.

    Args:
        model: The model; it is not changed.
        groups: Groups of one-dimensional shape.
        what: Description of the removed units for the error message.
        how: What else tells this trial from others of the same groups, for the cache.

    Raises:
        BadInput: the pruned copy does not run.
    """
    trials, names = _CACHE.value_for(model, _trace).trials, (how, *(group.name for group in groups))
    if names not in trials:
        trials[names] = _trial_error(model, groups)
    if trials[names]:
        raise BadInput(f"{type(model).__name__}: with {what} it does not run ({trials[names]})")


def _trace(model: nn.Module) -> _CacheEntry:
    return with_example(without_merging(model), _traced)


def _traced(copy: nn.Module, inputs: Tensor) -> _CacheEntry:
    trace = run_trace(copy, inputs)
    return _CacheEntry(ChannelGraph(trace, copy).groups(), [trace])


def _trial_error(model: nn.Module, groups: Sequence[Group]) -> str:
    copy = meta_copy(model)
    try:
        for group in groups:
            resize_group(copy, group, (group.units - group.units // 3,))
    except Exception as error:
        return first_line(error)
    return shape_error(copy)


def shape_error(model: nn.Module) -> str:
    """Return the error of a run of the model's copy at its own input size; empty if it runs."""
    try:
        with_example(model, run_once)
    except NotRunningError as error:
        return error.reason
    return ""


def output_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors that a model returns at its own input size.

    Raises:
        BadInput: the model does not run.
    """
    return with_example(model, lambda copy, inputs: [tuple(one.shape) for one in tensors_of(run_once(copy, inputs))])


def run_once(model: nn.Module, inputs: Tensor) -> Any:
    """Return the output of a model in evaluation mode, without gradients.

    Args:
        model: The model.
        inputs: Its input.
    """
    with torch.no_grad(), eval_mode(model), RememberedShapes():
        return model(inputs)


def end_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that read the image and that return the output, in a run on the meta device.

    Raises:
        BadInput: the model does not run on the meta device.
    """
    return _END_LAYERS.value_for(model, _find_end_layers)


def _find_end_layers(model: nn.Module) -> list[str]:
    return with_example(model, _end_layers_of_run)


def _end_layers_of_run(copy: nn.Module, inputs: Tensor) -> list[str]:
    calls: list[tuple[str, Tensor]] = []

    def record(path: str, output: Tensor) -> None:
        calls.append((path, output))

    for path, layer in copy.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, output, path=path: record(path, output))
    outputs = list(tensors_of(run_once(copy, inputs)))
    return [path for path, value in calls[:1]] + [
        path for path, value in calls[1:] if value.dim() == 2 and any(value is one for one in outputs)
    ]
