"""Channel dependency graph of a model: groups of coupled channels, from one traced forward pass.

Every activation carries labels of its channels. Operations unite labels in a union-find: channels that are added,
multiplied or contracted with each other are coupled and can only be pruned together. A parameter has labels along each
axis if it is multiplied as a matrix, and one label per element otherwise.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from vitprune.architectures.tracing.op_rules import apply_rms_norm_rule, apply_rule, propagate_to_fixpoint
from vitprune.architectures.tracing.recorded_run import Entered, Operation, RecordedPass
from vitprune.architectures.tracing.trace import NO_HEADS, Site, Trace
from vitprune.architectures.tracing.union_find import NO_CHANNEL, Array
from vitprune.groups import ParamSlice
from vitprune.runtime.outputs import tensors_of

Axis = tuple[str, int]  # a parameter and one of its axes
RMS_NORMS = (nn.RMSNorm, RmsNorm)
NO_NUMBERS: Mapping[int, int] = {}
IS_OUTPUT = "it is the output of the model"


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels: units that occur equally often along the same axes of the same parameters.

    Attributes:
        kind: Residual if two activations are added along these channels, attention if two activations are contracted
            over them, ffn otherwise.
        units: Number of units.
        slices: Slices of parameters that belong to the units, sorted by parameter.
        buffers: Slices of buffers, such as the running mean of a BatchNorm.
        writers: Weights whose rows are these channels, in the order of the forward pass.
        why_not: Reason why the units cannot be pruned; empty if they can.
        normalized: Description of a module that normalizes over these channels and counts them; empty if none does.
        roots: Representative of the labels of every unit.
    """

    kind: str
    units: int
    slices: tuple[ParamSlice, ...]
    buffers: tuple[ParamSlice, ...]
    writers: tuple[str, ...]
    why_not: str = ""
    normalized: str = ""
    roots: tuple[int, ...] = ()


class _AxisLabels:
    """Labels along one axis of a parameter, searchable by label."""

    def __init__(self, labels: Array) -> None:
        self.labels = labels
        self._order = labels.argsort(kind="stable")
        self._sorted = labels[self._order]
        of_channels = self._sorted[np.searchsorted(self._sorted, NO_CHANNEL, "right") :]
        starts = np.flatnonzero(np.diff(of_channels, prepend=NO_CHANNEL))
        self.present, self.counts = of_channels[starts], np.diff(starts, append=len(of_channels))

    def positions(self, labels: Array) -> Array:
        """Return the positions of labels that occur equally often, (labels, occurrences)."""
        first, end = (np.searchsorted(self._sorted, labels, side) for side in ("left", "right"))
        positions: Array = self._order[first[:, None] + np.arange(end[0] - first[0])]
        return positions


def _by_signature(axes: Mapping[Axis, _AxisLabels]) -> list[tuple[list[Axis], Array]]:
    """Partition all labels by how often they occur along each axis; return each class with its axes."""
    known, first_seen = np.unique(np.concatenate([axis.labels for axis in axes.values()]), return_index=True)
    classes, last = np.zeros(len(known), dtype=np.int64), 0
    where = {key: np.searchsorted(known, axis.present) for key, axis in axes.items()}
    for key, axis in axes.items():  # partition refinement: labels of one class that differ in one count are separated
        values = classes[where[key]] * (axis.counts.max(initial=0) + 1) + axis.counts
        is_one_class = len(values) and values.min() == values.max()
        refined = np.zeros_like(values) if is_one_class else np.unique(values, return_inverse=True)[1]
        classes[where[key]] = last + 1 + refined
        last += 1 + int(refined.max(initial=-1))
    axes_by_class: dict[int, list[Axis]] = defaultdict(list)
    for key in sorted(axes):
        for number in np.unique(classes[where[key]]).tolist():
            axes_by_class[number].append(key)
    members = {number: np.flatnonzero(classes == number) for number in axes_by_class}
    numbers = sorted(members, key=lambda number: int(first_seen[members[number]].min()))
    return [(axes_by_class[number], known[members[number]]) for number in numbers]


def _labels_by_axis(trace: Trace) -> dict[Axis, Tensor]:
    """Return the labels along each axis of matrices, and along the channel axis of elementwise parameters."""
    axes = {axis: trace.sets.find(labels) for axis, labels in trace.axes.items()}
    alone = trace.sets.are_alone()
    for name, elements in trace.elements.items():
        if not elements.numel():
            continue
        roots = trace.sets.find(elements.contiguous())
        along = [(axis, *entry) for axis in range(roots.dim()) if (entry := _along(roots, axis, alone)) is not None]
        if along:
            axis, labels, _ = min(along, key=lambda entry: entry[2])
            axes[name, axis] = labels
        else:
            trace.sets.mark_unprunable(roots, f"{name}: none of its axes is a channel axis")
    return axes


def _along(roots: Tensor, axis: int, alone: Tensor) -> tuple[Tensor, bool] | None:
    """Return the labels along an axis, and whether some are not used; None if used elements of one position differ."""
    if roots.dim() == 1 and len(roots) > 1:
        return roots, False
    flat = roots.movedim(axis, 0).reshape(roots.shape[axis], -1)
    used = ~alone[flat] if roots.dim() > 1 or len(roots) == 1 else torch.ones_like(flat, dtype=torch.bool)
    labels = flat.gather(1, used.int().argmax(dim=1, keepdim=True))  # of the first used element
    if not bool(used.any()) or not bool(((flat == labels) | ~used).all()):
        return None
    return labels[:, 0], not bool(used.any(dim=1).all())


class ChannelGraph:
    """Groups of coupled channels of a finished trace; later changes of the trace are not seen.

    Args:
        trace: The finished trace.
        model: The traced model.
    """

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self._axes = {axis: _AxisLabels(labels.numpy()) for axis, labels in _labels_by_axis(trace).items()}
        self._trace, self._buffers = trace, dict(model.named_buffers())
        self._sums, self._contractions = map(trace.sets.find_unique, (trace.residual_sums, trace.contractions))
        self._reason = trace.sets.reasons()
        self._members = _by_signature(self._axes)

    def groups(self, heads: Mapping[int, int] = NO_NUMBERS, in_part: bool = False) -> list[ChannelGroup]:
        """Return all groups in the order of the forward pass.

        Args:
            heads: Number of heads by root, for channels that alternate by head within a parameter; with it, only the
                groups of these channels are returned.
            in_part: Allow contracted channels along a part of an axis, such as queries and keys of a fused layer.
        """
        members = [entry for entry in self._members if not heads or int(entry[1][0]) in heads]
        groups = [self._group(axes, labels, heads, in_part) for axes, labels in members]
        order = {name: index for index, name in enumerate(self._trace.writers)}
        return sorted(groups, key=lambda group: min((order[name] for name in group.writers), default=len(order)))

    @cached_property
    def _normalized(self) -> dict[int, str]:
        """Descriptions of the norms over sets of channels, by representative of the set."""
        result: dict[int, str] = {}
        for labels, module in self._trace.normalized:
            result |= dict.fromkeys(self._trace.sets.find_unique([labels]), module)
        return result

    def _group(self, axes: list[Axis], labels: Array, heads: Mapping[int, int], in_part: bool) -> ChannelGroup:
        """Return the group of all labels of one signature; the units are in the order of the first writer."""
        writers = [name for name in self._trace.writers if (name, 0) in axes]
        first = (writers[0], 0) if writers else axes[0]
        labels = labels[self._axes[first].positions(labels)[:, 0].argsort()]
        why = self._reason(labels)
        contracted, added = (int(labels[0]) in roots for roots in (self._contractions, self._sums))
        kind = "attention" if contracted else "residual" if added else "ffn"
        in_part = in_part or self._trace.by_head or kind == "ffn"
        slices, number = [], heads.get(int(labels[0]), 1)
        for axis in axes:
            part = _param_slice(axis, self._axes[axis].positions(labels), len(self._axes[axis].labels), number, in_part)
            if part is None:
                why = why or f"{axis[0]}: only a part of its channels is in this group, or they are not evenly spaced"
            else:
                slices.append(part)
        learned = tuple(part for part in slices if part.param not in self._buffers)
        buffers = tuple(part for part in slices if part.param in self._buffers)
        roots = tuple(labels.tolist())
        normalized = self._normalized.get(roots[0], "")
        return ChannelGroup(kind, len(labels), learned, buffers, tuple(writers), why, normalized, roots)


def _param_slice(axis: Axis, positions: Array, length: int, heads: int, in_part: bool = False) -> ParamSlice | None:
    """Return the slice with these positions (units, occurrences), which may be part of the axis; None if none has."""
    units, count = positions.shape
    if units * count != length:
        start = int(positions.min())
        if not in_part or units == 1 or start + units * count != positions.max() + 1:
            return None
        part = _param_slice(axis, positions - start, units * count, heads)
        return part and replace(part, start=start)
    if units == 1:
        return ParamSlice(axis[0], axis[1], 1, count)
    for inner in (n for n in range(1, count + 1) if count % n == 0):
        regular = np.arange(length).reshape(count // inner, units, inner).swapaxes(0, 1).reshape(units, count)
        if np.array_equal(positions, regular):
            return ParamSlice(axis[0], axis[1], count // inner, inner)
    if heads > 1 and units % heads == 0:  # q, k and v of one head before those of the next
        regular = np.arange(length).reshape(heads, count, units // heads).swapaxes(1, 2).reshape(units, count)
        if np.array_equal(positions, regular):
            return ParamSlice(axis[0], axis[1], heads=heads, runs=count)
    segments = _segments(positions)
    return ParamSlice(axis[0], axis[1], segments=segments) if axis[1] == 0 and segments else None


def _segments(positions: Array) -> tuple[int, ...]:
    """Return the widths of repetitions of all units that differ in width; empty if there are no such repetitions."""
    units, count = positions.shape
    ends = np.flatnonzero(np.diff(positions[0], append=-1) != 1) + 1  # of the runs of consecutive positions of a unit
    widths = np.diff(ends, prepend=0)
    starts = units * np.concatenate([[0], np.cumsum(widths)[:-1]])
    grids = [np.arange(units * width).reshape(units, width) for width in widths]
    regular = np.concatenate([start + grid for start, grid in zip(starts, grids, strict=True)], axis=1)
    return tuple(widths.tolist()) if count > 1 and np.array_equal(positions, regular) else ()


def run_trace(run: RecordedPass, heads: Mapping[Site, Tensor] = NO_HEADS, ignored: Collection[str] = ()) -> Trace:
    """Trace a recorded forward pass; channels of the output are marked as not prunable.

    Args:
        run: The recorded run.
        heads: Numbers of heads, for a trace of whole heads, see `Trace`.
        ignored: Names of parameters and buffers without labels.
    """
    tensors = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    trace = Trace({name: value for name, value in tensors.items() if name not in ignored}, _name(run.model), heads)
    in_norm = False  # an RMSNorm is handled as one operation
    for event in run.events:
        if isinstance(event, Operation):
            if not in_norm:
                apply_rule(trace, event.func, event.args, event.kwargs, event.result)
        elif event.path:
            in_norm = isinstance(event.module, RMS_NORMS) and isinstance(event, Entered)
            if isinstance(event, Entered):
                trace.running.append((event.path, _name(event.module)))
            else:
                trace.running.pop()
                if isinstance(event.module, RMS_NORMS):
                    apply_rms_norm_rule(trace, event.module, event.args[0], event.output)
    propagate_to_fixpoint(trace)
    for value in tensors_of(run.output):
        labels = trace.labels_of(value)
        if labels is not None:
            trace.mark_unprunable(labels, IS_OUTPUT)
    trace.forget_tensors()
    return trace


def _name(module: nn.Module) -> str:
    return type(module).__name__
