"""Cached channel-dependency trace of a model, and a trial run of a pruned copy on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from vitprune.architectures.token_merging import without_merging
from vitprune.architectures.tracing.attention_heads import AttentionTrace, trace_attention
from vitprune.architectures.tracing.dependency_graph import ChannelGraph, ChannelGroup, run_trace
from vitprune.architectures.tracing.example_run import NotRunningError, meta_input, run_once, with_example
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.architectures.tracing.recorded_run import Left, recorded
from vitprune.architectures.tracing.trace import Trace
from vitprune.errors import BadInput
from vitprune.groups import Group, meta_copy, resize_group
from vitprune.runtime.messages import first_line
from vitprune.runtime.outputs import tensors_of


@dataclass(frozen=True)
class _CacheEntry:
    """Groups of a model, its trace until its heads are found, its heads, error of each trial run (empty: it ran)."""

    channels: list[ChannelGroup]
    trace: list[Trace]
    attention: list[AttentionTrace] = field(default_factory=list)
    trials: dict[tuple[str, ...], str] = field(default_factory=dict)


_CACHE: StructureCache[_CacheEntry] = StructureCache()
_APART: StructureCache[AttentionTrace] = StructureCache()
_END_LAYERS: StructureCache[list[str]] = StructureCache()


def traced_channels(model: nn.Module) -> list[ChannelGroup]:
    """Return the groups of coupled channels of a model at its own input size, cached for models of the same structure.

    Raises:
        BadInput: the model does not run.
    """
    return _CACHE.value_for(model, _trace).channels


def traced_attention(model: nn.Module, apart: bool = False) -> AttentionTrace:
    """Return the attention heads of a model and their channels, cached for models of the same structure.

    Args:
        model: The model.
        apart: Return channels of kinds qk and vo instead of attention.

    Raises:
        BadInput: the model does not run.
    """
    if apart:
        return _APART.value_for(model, _trace_apart)
    entry = _CACHE.value_for(model, _trace)
    if not entry.attention:
        entry.attention.append(trace_attention(recorded(without_merging(model)), entry.trace.pop()))
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
    run = recorded(without_merging(model))
    try:
        trace = run_trace(run)
        return _CacheEntry(ChannelGraph(trace, run.model).groups(), [trace])
    except Exception as error:  # operations of any model
        raise BadInput(f"{type(model).__name__}: its operations cannot be followed ({first_line(error)})") from None


def _trace_apart(model: nn.Module) -> AttentionTrace:
    run = recorded(without_merging(model))
    return trace_attention(run, run_trace(run), apart=True)


def _trial_error(model: nn.Module, groups: Sequence[Group]) -> str:
    copy = meta_copy(model)
    try:
        for group in groups:
            resize_group(copy, group, (group.units - group.units // 3,))
        run_once(copy, meta_input(copy))
    except Exception as error:  # a forward pass may raise anything
        return first_line(error)
    return ""


def shape_error(model: nn.Module) -> str:
    """Return the error of a run of the model's copy at its own input size; empty if it runs."""
    try:
        with_example(model, run_once)
    except NotRunningError as error:
        return error.reason
    return ""


def end_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that read the image and that return the output, in a run on the meta device.

    Raises:
        BadInput: the model does not run on the meta device.
    """
    return _END_LAYERS.value_for(model, _find_end_layers)


def _find_end_layers(model: nn.Module) -> list[str]:
    run = recorded(model)
    left = [event for event in run.events if isinstance(event, Left)]
    layers = [event for event in left if isinstance(event.module, nn.Linear | nn.Conv2d)]
    outputs = list(tensors_of(run.output))
    return [event.path for event in layers[:1]] + [
        event.path for event in layers[1:] if event.output.dim() == 2 and any(event.output is one for one in outputs)
    ]
