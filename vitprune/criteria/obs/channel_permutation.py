"""Channel permutation before N:M pruning: weights that are cheap to remove together come into the same run of M.

The order of FFN units, of the channels of a head and of residual channels is free: re-ordering them in every slice of
their group does not change the function, and costs nothing at run time.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from vitprune.architectures import find_groups
from vitprune.criteria import Statistics
from vitprune.criteria.obs.admm import Pattern
from vitprune.errors import BadInput
from vitprune.groups import Group, permute, reordered_positions
from vitprune.models.equality import same_logits

KINDS = ("ffn", "attention", "residual")
ROUNDS = 2  # passes over the positions of a run
CHUNK = 1 << 22  # values of the cost of every row, that are computed at once
TINY = 1e-300
Costs = Callable[[Tensor, Tensor], Tensor]  # other positions (M - 1, runs), candidates (runs,) -> (runs, candidates)


@dataclass(frozen=True)
class LayerLoss:
    """Quadratic loss of removing weights of a layer, the others being updated.

    Attributes:
        rows: Weights, scaled so that squared errors are in nats, (o, k).
        inverse: Inverse second moment of the inputs, (k, k).
    """

    rows: Tensor
    inverse: Tensor

    @property
    def single(self) -> Tensor:
        """Loss of removing a weight alone, w^2 / (2 [C^-1]_jj); (o, k)."""
        losses: Tensor = self.rows.square() / (2 * self.inverse.diagonal())
        return losses


@dataclass(frozen=True)
class ChannelOrders:
    """Orders of the units of groups.

    Attributes:
        groups: The groups that have an order.
        orders: By name of group, the old index of every unit in its new position, (units,).
    """

    groups: Sequence[Group]
    orders: Mapping[str, Tensor]


def channel_orders(
    model: nn.Module, losses: Mapping[str, LayerLoss], pattern: Pattern, images: Tensor
) -> ChannelOrders:
    """Choose the order of the units of every group, so that an N:M pattern removes weights of low loss.

    Minimizes the sum of the losses of the M - N cheapest weights of every run, over all rows of all layers that read
    the units. Residual channels are strongly correlated, so that single losses mislead: they are ordered by the joint
    loss of two weights, and only if M - N = 2. Each kind of group is used only if the permuted model has the same
    logits in float64.

    Args:
        model: The model.
        losses: By name of the weight.
        pattern: (N, M).
        images: A few images for the comparison of the logits.

    Source: RIA (Zhang et al., ICLR 2024), channel permutation by linear sum assignment; the costs are ours.
    """
    permuted: list[Group] = []
    orders: dict[str, Tensor] = {}
    for groups in permutable_groups(model):
        chosen = {group.name: order for group in groups if (order := _order(group, losses, pattern)) is not None}
        if chosen and same_logits(model, permute(copy.deepcopy(model), groups, chosen), images[:1]):
            orders |= chosen
            permuted += [group for group in groups if group.name in chosen]
    return ChannelOrders(permuted, orders)


def permutable_groups(model: nn.Module) -> Iterator[list[Group]]:
    """Yield the groups of every kind of `KINDS` that the model has."""
    for kind in KINDS:
        with contextlib.suppress(BadInput):  # the model has no units of this kind
            yield find_groups(model, [kind])


def permute_statistics(statistics: Statistics, chosen: ChannelOrders) -> Statistics:
    """Return the moments of the permuted model's layers: PATH/inputs (folds, k+1, k+1), PATH/metric_diagonal (o,)."""
    result = dict(statistics)
    for group in chosen.groups:
        for part in group.slices:
            path, _, leaf = part.param.rpartition(".")
            if leaf != "weight" or f"{path}/inputs" not in result:
                continue
            name = f"{path}/metric_diagonal" if part.axis == 0 else f"{path}/inputs"
            length = result[name].shape[-1] - (part.axis == 1)
            index = reordered_positions(part, chosen.orders[group.name], length)
            if part.axis == 0:
                result[name] = result[name][index]
            else:
                value = result[name]
                index = torch.cat([index, torch.tensor([len(index)])])  # the constant input
                result[name] = value[:, index][:, :, index].contiguous()
    return result


def assign_runs(total: Tensor, costs: Costs, every: int) -> Tensor:
    """Divide columns into runs of M, so that the sum of a cost over all runs is small.

    One position of all runs at a time is assigned anew, which is a linear sum assignment.

    Args:
        total: Loss of every column, (k,); at first, the columns are dealt out in this order.
        costs: Cost of every run with every candidate for a position.
        every: M; k is a multiple of it.

    Returns:
        The columns in their new order, (k,).
    """
    from scipy.optimize import linear_sum_assignment  # takes a second, which every stage would wait

    runs = total.argsort(descending=True, stable=True).view(every, -1)  # (M, k / M)
    runs[1::2] = runs[1::2].flip(1)
    for position in list(range(every)) * ROUNDS:
        others = torch.cat([runs[:position], runs[position + 1 :]])
        cost = costs(others, runs[position]).double().cpu().numpy()
        runs[position] = runs[position][torch.from_numpy(linear_sum_assignment(cost)[1])]
    return runs.T.flatten()


def single_costs(single: Tensor, pattern: Pattern) -> Costs:
    """Return the cost of runs as the sum of the M - N lowest single losses; `single` is (rows, k)."""
    removed = pattern[1] - pattern[0]

    def costs(others: Tensor, candidates: Tensor) -> Tensor:
        # a candidate lowers the sum of a run if it is below the largest of those that are removed without it
        lowest = single[:, others].topk(removed, dim=1, largest=False, sorted=True).values[:, -1]
        cost = torch.zeros(others.shape[1], len(candidates), dtype=torch.float64)
        for part in _chunks(len(single), cost.numel()):
            cost += (single[part][:, None, candidates] - lowest[part, :, None]).clamp_max(0).sum(dim=0)
        return cost

    return costs


def pair_costs(rows: Tensor, inverse: Tensor) -> Costs:
    """Return the cost of runs as the least joint loss of two weights: w^T H^-1 w / 2 for the block H of the inverse."""
    diagonal = inverse.diagonal()

    def joint(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cross = inverse[first, second]
        determinant = (2 * (diagonal[first] * diagonal[second] - cross.square())).clamp_min(TINY)
        return diagonal[second] / determinant, 2 * cross / determinant, diagonal[first] / determinant

    def costs(others: Tensor, candidates: Tensor) -> Tensor:
        pairs = [(others[a], others[b]) for a, b in combinations(range(len(others)), 2)]
        without = torch.stack([_pair_loss(rows[:, a], rows[:, b], *joint(a, b)) for a, b in pairs]).amin(dim=0)
        factors = [joint(other[:, None], candidates[None]) for other in others]
        cost = torch.zeros(others.shape[1], len(candidates), dtype=torch.float64)
        for part in _chunks(len(rows), cost.numel()):
            least = without[part, :, None]
            for other, factor in zip(others, factors, strict=True):
                loss = _pair_loss(rows[part][:, other, None], rows[part][:, None, candidates], *factor)
                least = torch.minimum(least, loss)
            cost += least.sum(dim=0)
        return cost

    return costs


def _pair_loss(first: Tensor, second: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return first.square() * a - first * second * b + second.square() * c


def _order(group: Group, losses: Mapping[str, LayerLoss], pattern: Pattern) -> Tensor | None:
    """Return the order of a group's units, or None if no layer reads them in runs of M."""
    heads = group.shape[0] if len(group.shape) > 1 else 1
    units, every = group.units // heads, pattern[1]
    parts = [part for part in group.slices if part.axis == 1 and part.param in losses and part.inner == part.runs == 1]
    parts = [part for part in parts if part.start is None]
    if not parts or units % every:
        return None
    single = torch.cat([losses[part.param].single.float().reshape(-1, group.units) for part in parts])
    if group.kind == "residual":
        if every - pattern[0] != 2 or any(part.outer > 1 for part in parts):
            return None
        readers = [pair_costs(losses[part.param].rows.float(), losses[part.param].inverse.float()) for part in parts]
        return assign_runs(
            single.sum(dim=0), lambda *runs: torch.stack([costs(*runs) for costs in readers]).sum(0), every
        )
    columns = single.view(-1, heads, units).unbind(dim=1)
    orders = [assign_runs(head.sum(dim=0), single_costs(head, pattern), every) for head in columns]
    return torch.cat([order + number * units for number, order in enumerate(orders)])


def _chunks(rows: int, values: int) -> Iterator[slice]:
    """Slices of the rows, whose costs of `values` each are computed at once."""
    step = max(1, CHUNK // values)
    return (slice(start, start + step) for start in range(0, rows, step))
