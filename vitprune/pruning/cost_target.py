"""Reach a cost target (parameters, MACs or latency) by a search over the sparsity."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.architectures.tracing.example_run import with_example
from vitprune.config.quantity import format_cost
from vitprune.data import example_input
from vitprune.errors import BadInput, Unreachable
from vitprune.evaluation.cost import count_macs
from vitprune.evaluation.latency import latency
from vitprune.evaluation.latency_table import LatencyTable, kept_width
from vitprune.groups import Group, Masks, all_units, shrink
from vitprune.runtime.messages import warn

COUNTS = ("params", "macs")
EXACT, MEASURED = 1e-9, 0.01  # precision of the scalar; measurements are noisy
BEYOND = 0.05  # distance of a step from the interpolation towards the middle, so that both ends of an interval move
CLOSE = 0.02  # relative deviation from the target above which it is explained
STEADY = 1.5  # largest ratio of the 90th to the 10th percentile of a clock that other processes do not disturb
SHORT_RUNS, LONG_RUNS = 15, 45  # forward passes per latency measurement: in the search, and of its result
TRIES = 4  # long measurements that correct the result of a search
CostFn = Callable[[Masks], float]  # masks of the dense model's groups -> cost as a fraction of the dense model's
Latencies = Mapping[str, float]  # milliseconds: median, p10 and p90, and the dense model's median measured alongside


@dataclass(frozen=True)
class CostModel:
    """Cost of pruning candidates.

    Attributes:
        cost: params, macs, latency or latency_ms.
        dense: Cost of the dense model, in parameters, MACs or milliseconds.
        relative_cost: Maps masks of the dense model's groups to a fraction of `dense`.
        latencies: Measures the latency of masks again with more runs; None if the cost is not measured.
        start: Cost of the model before the first cycle, as a fraction of `dense`; less than 1 if tokens are merged.
    """

    cost: str
    dense: float
    relative_cost: CostFn
    latencies: Callable[[Masks], Latencies] | None = None
    start: float = 1.0

    @property
    def precision(self) -> float:
        """Precision of the scalar of a search."""
        return EXACT if self.latencies is None else MEASURED

    def __call__(self, masks: Masks) -> float:
        """Return the cost of masks as a fraction of the dense model's."""
        return self.relative_cost(masks)

    def format(self, fraction: float) -> str:
        """Format a fraction of the dense model's cost with its unit."""
        unit = {"params": " parameters", "macs": " MACs"}.get(self.cost, " ms")
        return format_cost(fraction * self.dense) + unit


def is_fraction(target: Mapping[str, float]) -> bool:
    """Return whether a target is a fraction of the dense model's cost."""
    ((cost, amount),) = target.items()
    return cost != "latency_ms" and amount < 1


def fraction_of(target: Mapping[str, float], cost_model: CostModel, smallest: float) -> float:
    """Return a target as a fraction of the dense model's cost.

    Args:
        target: The target.
        cost_model: Cost model of the dense model.
        smallest: Least cost that can be reached.

    Raises:
        BadInput: the target is not between the least cost and the dense model's.
    """
    (amount,) = target.values()
    limits = f"the smallest is {smallest:.4f} ({cost_model.format(smallest)}); "
    limits += f"the dense model has {cost_model.format(1.0)}"
    fraction = amount if is_fraction(target) else amount / cost_model.dense
    shown = f"{amount:g} of the dense model" if is_fraction(target) else cost_model.format(fraction)
    if fraction >= 1:
        raise BadInput(f"prune.target: {shown} is not less than the dense model has; {limits}")
    if fraction < smallest:
        raise Unreachable(f"prune.target: {shown} cannot be reached, {limits}")
    return fraction


def relative_shares(sparsity: Mapping[str, float]) -> dict[str, float]:
    """Scale sparsities per kind so that the largest is 1.

    Raises:
        BadInput: all are 0.
    """
    largest = max(sparsity.values(), default=0.0)
    if not largest:
        raise BadInput("prune.sparsity: all shares are 0, so no target can be reached; give a share above 0 or null")
    return {kind: share / largest for kind, share in sparsity.items()}


def make_cost_model(
    model: nn.Module, groups: Sequence[Group], cost: str, table: LatencyTable | None = None
) -> CostModel:
    """Return the cost model of a dense model; its own cost is that without merging of tokens.

    Parameters and MACs are counted on shrunk copies without data; single weights count if they are not zero. Latency is
    that of a table, or measured on shrunk copies, alternating with a copy of the dense model.

    Args:
        model: The dense model.
        groups: Its groups.
        cost: params, macs, latency or latency_ms.
        table: Times of the groups, for latencies; None: measure.

    Raises:
        BadInput: the table does not fit the groups.
    """
    if cost in COUNTS:
        return _count_model(model, groups, cost)
    if table is not None:
        return _table_model(table, groups, cost)
    return _latency_model(copy.deepcopy(model), groups, cost)


def least_scalar(
    masks_at: Callable[[float], Masks], cost: CostFn, limit: float, precision: float = EXACT
) -> tuple[float, float]:
    """Find the least scalar in 0..1 whose masks cost no more than a limit.

    By linear interpolation, and by bisection after a step that did not halve the interval.

    The cost is below the limit by less than one removal from every candidate pool.

    Args:
        masks_at: Masks for a scalar; a larger scalar must remove a superset of the units.
        cost: Cost of masks.
        limit: Largest cost.
        precision: Precision of the scalar.

    Returns:
        The largest scalar known to cost too much, and the one found; (0, 0) if none costs too much.

    Raises:
        Unreachable: the limit cannot be reached.
    """
    low, high = 0.0, math.nextafter(1.0, 0.0)
    fewest = _remaining(masks_at(high))
    smallest = cost(masks_at(high))
    if smallest > limit:
        wanted = f"prune.target: {limit:g} of the dense model"
        raise Unreachable(f"{wanted} cannot be reached, the smallest is {smallest:.4f}")
    most, largest = _remaining(masks_at(low)), cost(masks_at(low))
    if largest <= limit:
        return low, low
    is_halved = True
    while (width := high - low) > precision and most - fewest > 1:
        share = (largest - limit) / (largest - smallest) if is_halved and smallest < largest else 0.5
        scalar = low + width * (share + BEYOND * (0.5 - share))
        masks = masks_at(scalar)
        remaining = _remaining(masks)
        reached = {fewest: smallest, most: largest}.get(remaining)
        reached = cost(masks) if reached is None else reached
        if reached <= limit:
            high, fewest, smallest = scalar, remaining, reached
        else:
            low, most, largest = scalar, remaining, reached
        is_halved = high - low <= width / 2
    return low, high


def refine_latency(
    masks_at: Callable[[float], Masks], measure: CostFn, limit: float, scalar: float, start: float = 1.0
) -> tuple[float, float]:
    """Correct the result of a search over short latency measurements by long ones.

    Short measurements that are low by chance end a search too early. The tries move along a line from the dense to the
    smallest model.

    Args:
        masks_at: Masks for a scalar.
        measure: Latency of masks.
        limit: Largest latency.
        scalar: Result of the search.
        start: Latency at scalar 0.

    Returns:
        The scalar with the largest latency below the limit, and that latency.
    """
    slope = max(start - measure(masks_at(math.nextafter(1.0, 0.0))), CLOSE)
    tried: dict[float, float] = {}
    for _ in range(TRIES):
        tried[scalar] = measure(masks_at(scalar))
        if limit * (1 - CLOSE) <= tried[scalar] <= limit:
            break
        aim = limit * (1 - CLOSE / 2)
        scalar = min(max(scalar + (tried[scalar] - aim) / slope, 0.0), math.nextafter(1.0, 0.0))
    below = [candidate for candidate, measured in tried.items() if measured <= limit]
    best = max(below, key=tried.__getitem__) if below else min(tried, key=tried.__getitem__)
    return best, tried[best]


def step_between(groups: Sequence[Group], more: Masks, fewer: Masks, cost_model: CostModel) -> str:
    """Describe the last removal of a search: its units, and the cost without it.

    Args:
        groups: Groups of the dense model.
        more: Masks before the removal.
        fewer: Masks after it.
        cost_model: The cost model.
    """
    units = {g.name: int(more[g.name].sum()) - int(fewer[g.name].sum()) for g in groups}
    cut = [group for group in groups if units[group.name]]
    if not cut:
        return "the rules alone remove enough"
    where = cut[0].name if len(cut) == 1 else f"{len(cut)} groups of kind {', '.join({g.kind: 0 for g in cut})}"
    cost = cost_model(more)
    return (
        f"the last {sum(units.values())} units are removed together, of {where}, and without that step it would be "
        f"{cost:.4f} ({cost_model.format(cost)})"
    )


def explain_miss(limit: float, reached: float, cost_model: CostModel, last_step: str) -> str:
    """Explain why a cost misses its limit by more than 2 %; empty if it does not.

    Args:
        limit: The limit, a fraction of the dense model's cost.
        reached: The cost reached, likewise.
        cost_model: The cost model.
        last_step: The last removal, in words.
    """
    if abs(reached / limit - 1) <= CLOSE:
        return ""
    off = f"{reached:.4f} ({cost_model.format(reached)}) is {abs(reached / limit - 1):.1%}"
    if reached > limit:
        return f"{off} above the target: {last_step or 'the masks were not selected for it'}"
    return f"{off} below the target: {last_step or 'scope, round_to and rules remove more units in one step'}"


def _remaining(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _count_model(model: nn.Module, groups: Sequence[Group], cost: str) -> CostModel:
    small, example = with_example(model, _counted_once)
    units = [group for group in groups if group.kind != "weight"]
    weights = {g.name: model.get_parameter(g.name).detach().cpu() != 0 for g in groups if g.kind == "weight"}
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())

    def counted(masks: Masks) -> float:
        smaller = shrink(copy.deepcopy(small), units, masks) if units else small
        if cost == "params" and weights:
            return nonzero - sum(int((used & ~masks[name]).sum()) for name, used in weights.items())
        if cost == "params":
            return sum(parameter.numel() for parameter in smaller.parameters())
        total, per_layer = count_macs(smaller, example)
        zeros = {name: _zeros(used, masks[name]) for name, used in weights.items()}
        return total - sum(per_layer.get(name.removesuffix(".weight"), 0) * share for name, share in zeros.items())

    all_tokens, before = without_merging(model), counted(all_units(groups))
    dense = before if all_tokens is model else _count_model(all_tokens, groups, cost).dense
    return CostModel(cost, dense, lambda masks: counted(masks) / dense, start=before / dense)


def _counted_once(model: nn.Module, image: Tensor) -> tuple[nn.Module, Tensor]:
    count_macs(model, image)  # raises an error if it does not run
    return model, image


def _table_model(table: LatencyTable, groups: Sequence[Group], cost: str) -> CostModel:
    times = table.all_times(groups)

    def share(masks: Masks) -> float:
        return table.fraction_at(times, {group.name: kept_width(group, masks) for group in groups})

    return CostModel(cost, table.milliseconds, share)


def _zeros(nonzero: Tensor, mask: Tensor) -> float:
    return 1 - int((nonzero & mask).sum()) / nonzero.numel()


def _latency_model(dense: nn.Module, groups: Sequence[Group], cost: str) -> CostModel:
    example, model, dense = example_input(dense, 1), dense, without_merging(dense)

    def both(masks: Masks, runs: int) -> Latencies:
        reference, pruned = latency([dense, shrink(copy.deepcopy(model), groups, masks)], example, runs)
        return {name: pruned[name] for name in ("median", "p10", "p90")} | {"dense": reference["median"]}

    def share(masks: Masks) -> float:
        times = both(masks, SHORT_RUNS)
        return times["median"] / times["dense"]

    times = latency([dense], example, LONG_RUNS)[0]
    if times["p90"] > STEADY * times["p10"]:
        spread = f"{times['p10']:.3g} to {times['p90']:.3g} ms (p10 to p90)"
        warn(f"prune.target.{cost}: the dense model takes {spread}; use a quiet machine, or a target in macs")
    start = 1.0 if dense is model else share(all_units(groups))
    return CostModel(cost, times["median"], share, lambda masks: both(masks, LONG_RUNS), start)
