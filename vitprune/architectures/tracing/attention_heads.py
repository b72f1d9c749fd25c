"""Attention heads of a model, and the channels of heads, found in traced forward passes.

A head is an index of the batch axis of a batched product of two activations, such as queries and keys. A second trace
starts with all channels of a head in one set, so that the logits and all tensors with one entry per head belong to it.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.architectures.tracing.dependency_graph import ChannelGraph, ChannelGroup, run_trace
from vitprune.architectures.tracing.recorded_run import RecordedPass
from vitprune.architectures.tracing.trace import Site, Trace
from vitprune.architectures.tracing.union_find import squeeze_broadcast
from vitprune.groups import is_within

DIFFERENT_WIDTHS = "its keys and values differ in width, so a channel of one is no channel of the other"
SHARED_CHANNELS = "heads share its channels"
Rows = dict[tuple[int, str], list[Tensor]]  # labels of channels by head and module of the product


@dataclass(frozen=True)
class TracedUnits:
    """Units found by tracing: heads of one attention, channels of its heads, or hidden units.

    Attributes:
        channels: The units with their slices; channels of heads are ordered by head.
        heads: Number of heads; of hidden units, their number.
        modules: Paths of the modules that multiply activations of these heads.
        why_not: Reason why the units cannot be pruned; empty if they can.
        width: Number of channels of the queries of a head, or of its values.
        queries: Parameters with rows of queries, each with the repetition of all units that is the queries.
        projections: Paths of the layers that write queries, keys and values, three times the same if they are fused in
            this order; empty if it is not one layer each.
    """

    channels: ChannelGroup
    heads: int
    modules: tuple[str, ...]
    why_not: str
    width: int = 1
    queries: tuple[tuple[str, int], ...] = ()
    projections: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionTrace:
    """Heads and channels of all attentions, in the order of the forward pass, and the modules with their products.

    Attributes:
        heads: Whole heads.
        channels: Channels of heads by kind: qk those of queries and keys, vo those of values and output, attention
            both, tied by their position.
        modules: Paths of the modules with products of heads.
    """

    heads: list[TracedUnits]
    channels: dict[str, list[TracedUnits]]
    modules: frozenset[str] = frozenset()


def trace_attention(run: RecordedPass, trace: Trace, apart: bool = False) -> AttentionTrace:
    """Find all attention heads of a model, and the channels of heads.

    Args:
        run: A recorded run of the model.
        trace: Its finished trace; the channels of q, k and v are united in it, unless they are wanted apart.
        apart: Find channels of kinds qk and vo instead of attention.
    """
    model = run.model
    labeled = _LabeledHeads(trace)
    if not labeled.count:
        return AttentionTrace([], {})
    numbers = labeled.numbers_by_site()
    by_head = run_trace(run, numbers)
    shared = _tables_outside(by_head, trace, labeled)
    if shared:
        by_head = run_trace(run, numbers, shared)
    _tie_shared_tables(by_head, trace, labeled)
    _tie_fused_rows(by_head)
    groups = _tie_mixed_heads(by_head, model)
    head_of_number = by_head.sets.find(by_head.head_labels)  # by number: representative of the head
    modules, widths = _products_of_heads(trace, labeled, head_of_number)
    all_heads = set(head_of_number[1:].tolist())
    heads = []
    for channels in groups:
        if all_heads.intersection(channels.roots):
            norm = channels.normalized and f"{channels.normalized}: a norm over all heads couples them"
            inside = sorted({path for root in channels.roots for path in modules[root]})
            width = min(widths[root] for root in channels.roots)
            heads.append(TracedUnits(channels, channels.units, tuple(inside), channels.why_not or norm, width))
    products = frozenset(product.module for product in trace.products)
    if apart:
        return AttentionTrace(heads, _channels_apart(trace, model, labeled, head_of_number), products)
    of_heads, others = _channels_of_heads(trace, model, labeled, head_of_number)
    of_heads += _heads_without_channels(others, heads, of_heads)
    return AttentionTrace(heads, {"attention": of_heads}, products)


class _LabeledHeads:
    """Number of the head of every label of a trace, 0 for labels outside any head."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        in_heads = trace.heads.find_unique(trace.in_heads)
        for inputs, outputs in trace.grouped if in_heads else ():
            trace.heads.grow(1 + int(inputs.max()))
            if in_heads >= trace.heads.find_unique([inputs]):
                trace.unite_heads(inputs[:, :1], outputs)
                trace.unite_heads(inputs[:, :1], inputs)
        touched = np.unique(np.concatenate([np.zeros(1, np.int64), *(x.numpy().ravel() for x in trace.in_heads)]))
        self.touched = torch.from_numpy(touched[touched > 0])
        roots, numbers = np.unique(trace.heads.find(self.touched).numpy(), return_inverse=True)
        self.count = len(roots)
        self.number_of = torch.zeros(int(trace.sets.new_labels(1)), dtype=torch.int64)
        self.number_of[self.touched] = torch.from_numpy(numbers + 1)

    def numbers_by_site(self) -> dict[Site, Tensor]:
        """Return the numbers of heads along the axes of matrices, and of the elements of other parameters."""
        sites: dict[Site, Tensor] = dict(self._trace.axes.items())
        sites |= {(name, None): labels for name, labels in self._trace.elements.items()}
        numbers = {site: self.number_of[labels] for site, labels in sites.items()}
        return {site: values for site, values in numbers.items() if bool(values.any())}


def _tables_outside(by_head: Trace, trace: Trace, labeled: _LabeledHeads) -> set[str]:
    """Return tables that several attentions read, such as rotary frequencies, whose entries were coupled with heads.

    In an attention of one head, a table that all heads share looks like a table with one entry per head.
    """
    modules, _ = _products_of_heads(trace, labeled, by_head.sets.find(by_head.head_labels))
    counts = Counter(by_head.sets.find(by_head.head_labels[1:]).tolist())
    several = {root for root, paths in modules.items() if len(paths) > 1 and counts[root] > 1}
    tables = {name: labels for name, labels in by_head.elements.items() if _contains(by_head, labels, several)}
    roots = {name: by_head.sets.find_unique([labels]) for name, labels in tables.items()}
    return {
        name
        for name, of_table in roots.items()
        for root in several & of_table
        if len(of_table) == 1 and not any(is_within(name, [path]) for path in modules[root] if path)
    }


def _tie_shared_tables(by_head: Trace, trace: Trace, labeled: _LabeledHeads) -> None:
    """Unite the heads of several attentions that have one position of a table, such as frequencies (blocks, heads, c).

    A table can be cut along one axis only: the one along which the heads of one attention differ.
    """
    modules, _ = _products_of_heads(trace, labeled, by_head.sets.find(by_head.head_labels))
    for elements in by_head.elements.values():
        if not _contains(by_head, elements, modules):
            continue
        varying = [axis for axis in range(elements.dim()) if by_head.varies_along(elements, axis)]
        roots = by_head.sets.find(elements.contiguous())
        for axis in varying if len(varying) > 1 else ():
            at = [sorted(modules.keys() & set(np.unique(part.numpy()).tolist())) for part in roots.unbind(axis)]
            paths = [[path for root in here for path in modules[root]] for here in at]
            if any(len(here) > 1 for here in at) and all(len(one) == len(set(one)) for one in paths):
                for here in at:
                    by_head.sets.union(torch.tensor(here[:1]), torch.tensor(here))
                break


def _contains(trace: Trace, labels: Tensor, roots: Collection[int]) -> bool:
    """Return whether labels are of some sets; weights that are used element by element have millions of labels."""
    representatives = trace.sets.find(labels.contiguous()).numpy()
    return bool(np.isin(representatives, np.fromiter(roots, dtype=np.int64, count=len(roots))).any())


def _tie_fused_rows(trace: Trace) -> None:
    """Unite rows of one weight that are not coupled, such as those of q and k with those of v, by their order.

    A unit then has equally many rows, evenly spaced, so that the fused weight can be cut.
    """
    in_heads = trace.sets.find_unique([trace.head_labels] if trace.by_head else trace.in_heads)
    for (_, axis), labels in trace.axes.items():
        if axis != 0:
            continue
        roots, first, counts = np.unique(trace.sets.find(labels).numpy(), return_index=True, return_counts=True)
        sizes = np.unique(counts)
        if len(sizes) < 2 or not in_heads.issuperset(roots.tolist()):
            continue
        parts = [roots[counts == size][first[counts == size].argsort()] for size in sizes]
        if len({len(part) for part in parts}) == 1:
            for part in parts[1:]:
                trace.sets.union(torch.from_numpy(parts[0]), torch.from_numpy(part))


def _tie_mixed_heads(trace: Trace, model: nn.Module) -> list[ChannelGroup]:
    """Unite each mixture of the logits of all heads with the head of its number, and return the groups of the trace.

    Talking heads are mixed before and after the softmax: the mixtures are read from heads and written to these heads.
    """
    groups, tied = ChannelGraph(trace, model).groups(), False
    all_heads = trace.sets.find_unique([trace.head_labels[1:]])
    for heads in (group for group in groups if all_heads.intersection(group.roots)):
        sites = _sites(heads)
        for mixed in (group for group in groups if group.writers and group.units == heads.units):
            read = [part.param for part in mixed.slices if part.axis == 1]
            if read and sites.issuperset({*((name, 1) for name in mixed.writers), *((name, 0) for name in read)}):
                trace.sets.union(torch.tensor(heads.roots), torch.tensor(mixed.roots))
                tied = True
    return ChannelGraph(trace, model).groups() if tied else groups


def _products_of_heads(
    trace: Trace, labeled: _LabeledHeads, head_of_number: Tensor
) -> tuple[Mapping[int, set[str]], Mapping[int, int]]:
    """Return by head the paths of the modules of its products, and the number of channels of its queries or values."""
    modules: dict[int, set[str]] = defaultdict(set)
    widths: dict[int, int] = {}
    for product in trace.products:
        for labels, axis in ((product.left, -1), (product.right, -2 if product.over_channels else -1)):
            if labels is not None:
                for number in np.unique(labeled.number_of[squeeze_broadcast(labels)].numpy()).tolist():
                    head = int(head_of_number[number])
                    modules[head].add(product.module)
                    if trace.varies_along(labels, axis):
                        widths[head] = min(widths.get(head, labels.shape[axis]), labels.shape[axis])
    return modules, defaultdict(lambda: 1, widths)


def _channels_apart(
    trace: Trace, model: nn.Module, labeled: _LabeledHeads, head_of_number: Tensor
) -> dict[str, list[TracedUnits]]:
    """Return the channels of q and k, and those of v and the output, by kind."""
    rows, graph = _rows_by_head(trace, labeled, head_of_number), ChannelGraph(trace, model)
    return {
        kind: _units_of_rows(trace, graph, labeled, head_of_number, rows, rows[role], in_part=True)[0]
        for kind, role in (("qk", 0), ("vo", 2))
    }


def _channels_of_heads(
    trace: Trace, model: nn.Module, labeled: _LabeledHeads, head_of_number: Tensor
) -> tuple[list[TracedUnits], list[ChannelGroup]]:
    """Tie the channels of q and k to those of v by their position; return the tied channels, and all groups."""
    rows = _rows_by_head(trace, labeled, head_of_number)
    queries, _, values = rows
    different = set()
    for (head, module), of_head in queries.items():
        apart = [row for (other, path), of_role in values.items() if other == head and (other, path) not in queries
                 for row in of_role]  # fmt: skip
        for row in (*values.get((head, module), ()), *apart):
            if len(row) == len(of_head[0]):
                trace.sets.union(of_head[0], row)
            else:
                different.add(head)
    _tie_fused_rows(trace)
    graph = ChannelGraph(trace, model)
    return _units_of_rows(trace, graph, labeled, head_of_number, rows, queries, different=different)


def _units_of_rows(
    trace: Trace,
    graph: ChannelGraph,
    labeled: _LabeledHeads,
    head_of_number: Tensor,
    rows: tuple[Rows, Rows, Rows],
    chosen: Rows,
    in_part: bool = False,
    different: Collection[int] = (),
) -> tuple[list[TracedUnits], list[ChannelGroup]]:
    """Return the sets of channels with some of the rows of q, k and v, ordered by head, and all groups of the graph.

    `different` are heads whose keys and values differ in width.
    """
    heads_of_root: dict[int, set[int]] = defaultdict(set)
    heads = head_of_number[labeled.number_of[labeled.touched]].tolist()
    for root, head in zip(trace.sets.find(labeled.touched).tolist(), heads, strict=True):
        heads_of_root[root].add(head)
    wanted = trace.sets.find_unique([row for of_head in chosen.values() for row in of_head])
    modules_of_root: dict[int, set[str]] = defaultdict(set)
    for (_, module), of_head in (entry for of_role in rows for entry in of_role.items()):
        for root in trace.sets.find_unique(of_head):
            modules_of_root[root].add(module)
    result = []
    groups = graph.groups(in_part=in_part)
    for channels in groups:
        if not wanted.intersection(channels.roots):
            continue
        owners = [heads_of_root.get(root, set()) for root in channels.roots]
        number = len(set().union(*owners))
        why = channels.normalized and f"{channels.normalized}: a norm over the head couples its channels"
        if set().union(*owners).intersection(different):
            why = DIFFERENT_WIDTHS
        if any(len(heads) != 1 for heads in owners) or (number and channels.units % number):
            why = why or SHARED_CHANNELS
        inside = sorted({path for root in channels.roots for path in modules_of_root[root]})
        result.append((channels, number, why, inside))
    numbers = {root: number for channels, number, _, _ in result for root in channels.roots}
    by_roots = {channels.roots: channels for channels in (graph.groups(numbers, in_part) if numbers else ())}
    units, roles = [], [_labels_of_rows(trace, of_role) for of_role in rows]
    for channels, number, why, inside in result:
        spaced = by_roots[channels.roots]
        tied = TracedUnits(spaced, number, tuple(inside), why or spaced.why_not, spaced.units // max(number, 1))
        units.append(_with_layers(tied, trace, roles))
    return units, groups


def _heads_without_channels(
    others: Sequence[ChannelGroup], heads: Sequence[TracedUnits], channels: Sequence[TracedUnits]
) -> list[TracedUnits]:
    """Return the heads none of whose channels are contracted with each other, with the reason."""
    covered = {_sites(group.channels) for group in channels}
    modules = {path for group in channels for path in group.modules}
    result = []
    for group in heads:
        sites = _sites(group.channels)
        if not any(sites & known for known in covered) and not modules.issuperset(group.modules):
            reasons = [one.why_not for one in others if one.why_not and sites & _sites(one)]
            why = next(iter(reasons), "its queries and keys are not contracted over their channels")
            result.append(replace(group, why_not=why))
    return result


def _sites(channels: ChannelGroup) -> frozenset[tuple[str, int | None]]:
    return frozenset((part.param, part.axis) for part in channels.slices)


def _with_layers(group: TracedUnits, trace: Trace, roles: Sequence[Tensor]) -> TracedUnits:
    """Return the group with the layers of its queries, keys and values, given by label whether it is a row of each."""
    parts = [_parts_of(trace, group.channels, labels) for labels in roles]
    layers = [name.removesuffix(".weight") for of_role in parts for name, _ in of_role if name.endswith(".weight")]
    order = [repetition for of_role in parts for name, repetition in of_role if name.endswith(".weight")]
    is_plain = len(layers) == 3 and (order == [0, 1, 2] if len(set(layers)) == 1 else len(set(layers)) == 3)
    return replace(group, queries=tuple(parts[0]), projections=tuple(layers) if is_plain else ())


def _labels_of_rows(trace: Trace, rows: Rows) -> Tensor:
    """Return by label whether it is one of the rows of all heads, or of the biases that are added to them."""
    chosen = torch.zeros(int(trace.sets.new_labels(1)), dtype=torch.bool)
    for row in (row for of_head in rows.values() for row in of_head):
        chosen[row] = True
    biases = torch.zeros_like(chosen)
    for bias, labels in ((bias.flatten(), squeeze_broadcast(labels).flatten()) for bias, labels in trace.shifts):
        if len(bias) == len(labels):
            biases[bias[chosen[labels]]] = True
    return chosen | biases


def _parts_of(trace: Trace, channels: ChannelGroup, chosen: Tensor) -> list[tuple[str, int]]:
    """Return parameters with chosen rows, each with the repetition of all units of the group that they are."""
    result: list[tuple[str, int]] = []
    for part in channels.slices:
        labels = trace.axes.get((part.param, 0), trace.elements.get(part.param))
        positions: list[int] = []
        if labels is not None and part.axis == 0 and labels.dim() == 1:
            end = part.end(channels.units)
            positions = chosen[labels[part.start or 0 : end]].nonzero().flatten().tolist()
        repetitions = {position // (channels.units // part.heads * part.inner) for position in positions}
        if part.runs > 1:
            repetitions = {repetition % part.runs for repetition in repetitions}
        result += [(part.param, number) for number in sorted(repetitions)]
    return result


def _rows_by_head(trace: Trace, labeled: _LabeledHeads, head_of_number: Tensor) -> tuple[Rows, Rows, Rows]:
    """Return by head and module the labels of the channels of queries, keys and values, of products with logits."""
    queries: Rows = defaultdict(list)
    keys: Rows = defaultdict(list)
    values: Rows = defaultdict(list)
    for product in trace.products:
        left, right = product.left, product.right
        of_logits = [one is None or not any(trace.varies_along(one, axis) for axis in (1, 2)) for one in (left, right)]
        chosen: list[tuple[Tensor, Rows]] = []
        if product.over_channels and left is not None and right is not None:
            chosen = [(left[:, 0, :], queries), (right[:, :, 0], keys)]
        elif of_logits[0] and right is not None and trace.varies_along(right, 2):
            chosen = [(right[:, 0, :], values)]
        elif of_logits[1] and left is not None and trace.varies_along(left, 1):  # of maps, channels first
            chosen = [(left[:, :, 0], values)]
        for rows, of_role in chosen:
            for row in squeeze_broadcast(rows):
                known = of_role[int(head_of_number[labeled.number_of[row[0]]]), product.module]
                if not any(torch.equal(row, other) for other in known):
                    known.append(row)
    return queries, keys, values
