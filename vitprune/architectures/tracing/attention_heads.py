"""Attention heads of a model, and the channels of heads, found in traced forward passes.

A head is an index of the batch axis of a batched product of two activations, such as queries and keys. A second trace
starts with all channels of a head in one set, so that the logits and all tensors with one entry per head belong to it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitprune.architectures.tracing.dependency_graph import ChannelGroup, groups_of_trace, run_trace
from vitprune.architectures.tracing.trace import Site, Trace
from vitprune.architectures.tracing.union_find import squeeze_broadcast

DIFFERENT_WIDTHS = "its keys and values differ in width, so a channel of one is no channel of the other"
SHARED_CHANNELS = "heads share its channels"


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one attention, or the channels of its heads.

    Attributes:
        channels: the units, heads or channels ordered by head, with their slices.
        heads: number of heads.
        modules: paths of the modules that multiply activations of these heads.
        why_not: reason why the units cannot be pruned; empty if they can.
        queries: parameters with rows of queries, each with the repetition of all units that is the queries.
        projections: paths of the layers that write queries, keys and values, three times the same if they are fused in
            this order; empty if it is not one layer each.
    """

    channels: ChannelGroup
    heads: int
    modules: tuple[str, ...]
    why_not: str
    queries: tuple[tuple[str, int], ...] = ()
    projections: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionTrace:
    """Attention heads and channels of a model, in the order of the forward pass."""

    heads: list[HeadGroup]
    channels: list[HeadGroup]


def trace_attention(model: nn.Module, example_input: Tensor) -> AttentionTrace:
    """Find all attention heads of a model, and the channels of heads, those of q, k, v and the output tied by position.

    Args:
        model: the model; it runs twice, in evaluation mode. Parameters may be on the meta device.
        example_input: an image (1, C, H, W), on the device of the model.
    """
    trace = run_trace(model, example_input)
    labelled = _LabelledHeads(trace)
    if not labelled.count:
        return AttentionTrace([], [])
    by_head = run_trace(model, example_input, labelled.numbers_by_site())
    _tie_fused_rows(by_head)
    head_of_number = by_head.sets.find(by_head.head_labels)  # by number: representative of the head
    modules = _modules_of_heads(trace, labelled, head_of_number)
    found = set(head_of_number[1:].tolist())
    heads = []
    for channels in groups_of_trace(by_head, model):
        if found.intersection(channels.roots):
            why = channels.why_not or (
                channels.normalized and f"{channels.normalized}: a norm over all heads couples them"
            )
            inside = sorted({path for root in channels.roots for path in modules[root]})
            heads.append(HeadGroup(channels, channels.units, tuple(inside), why))
    return AttentionTrace(heads, _channels_of_heads(trace, model, labelled, head_of_number, modules))


class _LabelledHeads:
    """Number of the head of every label of a trace, 0 for labels outside any head."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        touched = torch.cat(
            [labels.flatten() for labels in trace.in_heads] or [torch.zeros(0, dtype=torch.int64)]
        ).unique()
        touched = touched[touched > 0]
        roots, numbers = trace.heads.find(touched).unique(return_inverse=True)
        self.count = len(roots)
        self.number_of = torch.zeros(int(trace.sets.new_labels(1)), dtype=torch.int64)
        self.number_of[touched] = numbers + 1
        self.touched = touched

    def numbers_by_site(self) -> dict[Site, Tensor]:
        """Return the numbers of heads along the axes of matrices, and of the elements of other parameters."""
        sites: dict[Site, Tensor] = {**self._trace.axes}
        sites |= {(name, None): labels for name, labels in self._trace.elements.items()}
        numbers = {site: self.number_of[labels] for site, labels in sites.items()}
        return {site: values for site, values in numbers.items() if bool(values.any())}


def _tie_fused_rows(trace: Trace) -> None:
    """Unite rows of one weight that are not coupled, such as those of q and k with those of v, by their order.

    A unit then has equally many rows, evenly spaced, so that the fused weight can be cut.
    """
    in_heads = (
        trace.sets.find_unique(trace.in_heads) if not trace.by_head else trace.sets.find_unique([trace.head_labels])
    )
    for (_, axis), labels in trace.axes.items():
        if axis != 0:
            continue
        rows = trace.sets.find(labels)
        roots, counts = rows.unique(return_counts=True)
        if len(counts.unique()) < 2 or not in_heads.issuperset(roots.tolist()):
            continue
        order = torch.stack(
            [(labels_of == root).nonzero()[0, 0] for labels_of in [trace.sets.find(labels)] for root in roots]
        )
        parts = [roots[counts == count][order[counts == count].argsort()] for count in counts.unique()]
        if len({len(part) for part in parts}) == 1:
            for part in parts[1:]:
                trace.sets.union(parts[0], part)


def _modules_of_heads(trace: Trace, labelled: _LabelledHeads, head_of_number: Tensor) -> Mapping[int, set[str]]:
    modules: dict[int, set[str]] = defaultdict(set)
    for product in trace.products:
        for labels in (product.left, product.right):
            if labels is not None:
                for number in labelled.number_of[squeeze_broadcast(labels)].unique().tolist():
                    modules[int(head_of_number[number])].add(product.module)
    return modules


def _channels_of_heads(
    trace: Trace,
    model: nn.Module,
    labelled: _LabelledHeads,
    head_of_number: Tensor,
    modules: Mapping[int, set[str]],
) -> list[HeadGroup]:
    """Tie the channels of q and k to those of v by their position, and return the groups of all tied channels."""
    queries, keys, values = _rows_by_head(trace, labelled, head_of_number)
    different = set()
    for head, rows in queries.items():
        for other in values.get(head, []):
            if len(other) == len(rows[0]):
                trace.sets.union(rows[0], other)
            else:
                different.add(head)
    _tie_fused_rows(trace)
    roots = trace.sets.find(labelled.touched).tolist()
    heads_of_root: dict[int, set[int]] = defaultdict(set)
    for root, label in zip(roots, labelled.touched.tolist(), strict=True):
        heads_of_root[root].add(int(head_of_number[labelled.number_of[label]]))
    contracted = trace.sets.find_unique([row for rows in queries.values() for row in rows])
    result = []
    for channels in groups_of_trace(trace, model):
        if not contracted.intersection(channels.roots):
            continue
        owners = [heads_of_root.get(root, set()) for root in channels.roots]
        number = len(set().union(*owners))
        why = channels.normalized and f"{channels.normalized}: a norm over the head couples its channels"
        if different & set().union(*owners):
            why = DIFFERENT_WIDTHS
        if any(len(heads) != 1 for heads in owners) or (number and channels.units % number):
            why = why or SHARED_CHANNELS
        result.append(
            (channels, number, why, sorted({path for heads in owners for head in heads for path in modules[head]}))
        )
    by_heads = {number: groups_of_trace(trace, model, number) for number in {number for _, number, _, _ in result}}
    return [
        _with_layers(HeadGroup(spaced, number, tuple(inside), why or spaced.why_not), trace, (queries, keys, values))
        for channels, number, why, inside in result
        for spaced in by_heads[number]
        if spaced.roots == channels.roots
    ]


def _with_layers(group: HeadGroup, trace: Trace, roles: Sequence[Mapping[int, list[Tensor]]]) -> HeadGroup:
    """Return the group with the layers of its queries, keys and values."""
    parts = [_parts_of(trace, group.channels, rows) for rows in roles]
    layers = [name.removesuffix(".weight") for found in parts for name, _ in found if name.endswith(".weight")]
    order = [repetition for found in parts for name, repetition in found if name.endswith(".weight")]
    is_plain = len(layers) == 3 and (order == [0, 1, 2] if len(set(layers)) == 1 else len(set(layers)) == 3)
    return replace(group, queries=tuple(parts[0]), projections=tuple(layers) if is_plain else ())


def _parts_of(trace: Trace, channels: ChannelGroup, rows: Mapping[int, list[Tensor]]) -> list[tuple[str, int]]:
    """Return weights and biases with these rows, each with the repetition of all units of the group that they are."""
    chosen = torch.cat([row for rows_of_head in rows.values() for row in rows_of_head])
    result = []
    for part in channels.slices:
        labels = trace.axes.get((part.param, 0)) if part.axis == 0 else None
        position = torch.isin(labels, chosen).nonzero().flatten() if labels is not None else ()
        if len(position):
            repetition = int(position[0]) // (channels.units // part.heads * part.inner)
            result.append((part.param, repetition % part.runs if part.runs > 1 else repetition))
            bias = f"{part.param.removesuffix('weight')}bias"
            result += [(bias, result[-1][1]) for other in channels.slices if other.param == bias]
    return result


def _rows_by_head(
    trace: Trace, labelled: _LabelledHeads, head_of_number: Tensor
) -> tuple[Mapping[int, list[Tensor]], Mapping[int, list[Tensor]], Mapping[int, list[Tensor]]]:
    """Return by head the labels of the channels of queries, of keys and of values, of every product with logits."""
    queries: dict[int, list[Tensor]] = defaultdict(list)
    keys: dict[int, list[Tensor]] = defaultdict(list)
    values: dict[int, list[Tensor]] = defaultdict(list)
    for product in trace.products:
        left, right = product.left, product.right
        of_logits = left is None or not any(trace.varies_along(left, axis) for axis in (1, 2))
        found: list[tuple[Tensor, dict[int, list[Tensor]]]] = []
        if product.over_channels and left is not None and right is not None:
            found = [(left[:, 0, :], queries), (right[:, :, 0], keys)]
        elif of_logits and right is not None and trace.varies_along(right, 2):
            found = [(right[:, 0, :], values)]
        for rows, of_role in found:
            for row in squeeze_broadcast(rows):
                head = int(head_of_number[labelled.number_of[row[0]]])
                if not any(torch.equal(row, other) for other in of_role[head]):
                    of_role[head].append(row)
    return queries, keys, values
