"""How much to remove for a model of a given cost: parameters, MACs or latency, as a fraction or in absolute units."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.config.quantity import Quantity, format_cost, number_of
from vitprune.data import example_input
from vitprune.errors import BadInput
from vitprune.evaluation.cost import count_macs
from vitprune.evaluation.latency import latency
from vitprune.groups import Group, Masks, meta_copy, shrink

COUNTS = ("params", "macs")
COSTS = (*COUNTS, "latency", "latency_ms")
PRECISION = {"params": 1e-9, "macs": 1e-9, "latency": 0.01, "latency_ms": 0.01}  # of the scalar; a clock is no finer
CLOSE = 0.02  # of the target: a larger miss is explained
RUNS, LONG = 15, 45  # forward passes of each model behind a latency: while searching, and of what is found
TRIES = 4  # to correct a search by longer readings
CostFn = Callable[[Masks], float]  # masks of the dense model's groups -> cost as a fraction of the dense model's
Spread = Mapping[str, float]  # milliseconds: median, p10 and p90, and the dense model's median beside it


@dataclass(frozen=True)
class CostModel:
    """What candidates cost: masks of the dense model's groups to a fraction of the `whole` that the dense model costs.

    The whole is in parameters, MACs or milliseconds; `spread`, of a clock alone, measures anew and longer.
    """

    cost: str
    whole: float
    share: CostFn
    spread: Callable[[Masks], Spread] | None = None

    def __call__(self, masks: Masks) -> float:
        """Cost as a fraction of the dense model's."""
        return self.share(masks)

    def said(self, fraction: float) -> str:
        """A fraction of the whole in words."""
        unit = {"params": " parameters", "macs": " MACs"}.get(self.cost, " ms")
        return format_cost(fraction * self.whole) + unit


def check(target: Mapping[str, Quantity], kinds: Sequence[str]) -> None:
    """Refuse a target that is not one cost and a fraction, or an absolute number where the cost takes one.

    Text that says no quantity is left to `fraction_of`, which can say what the model has.

    Raises:
        BadInput: it names no cost or several, an unknown one, a number that it does not take, or the latency of zeros.
    """
    if len(target) != 1:
        raise BadInput(f"prune.target: names {len(target)} costs; give one of {', '.join(COSTS)}")
    ((cost, asked),) = target.items()
    if cost not in COSTS:
        raise BadInput(f"prune.target.{cost}: unknown; use one of {', '.join(COSTS)}")
    if cost.startswith("latency") and "weight" in kinds:
        raise BadInput(f"prune.target.{cost}: single weights become zeros, which take as long; use params or macs")
    if isinstance(asked, str):
        return
    if cost == "latency_ms" and not 0 < asked < math.inf:
        raise BadInput(f"prune.target.latency_ms: {asked} is not above 0 (milliseconds of a forward pass)")
    if cost != "latency_ms" and not (0 < asked < 1 or (cost in COUNTS and 1 < asked < math.inf)):
        other = (
            " nor above 1 (an absolute number, such as 600M)" if cost in COUNTS else "; for milliseconds: latency_ms"
        )
        raise BadInput(
            f"prune.target.{cost}: {asked} is not above 0 and below 1 (the fraction of the dense model){other}"
        )


def is_fraction(target: Mapping[str, Quantity]) -> bool:
    """Whether a checked target is a fraction, known without the model."""
    ((cost, asked),) = target.items()
    return cost != "latency_ms" and not isinstance(asked, str) and asked < 1


def fraction_of(target: Mapping[str, Quantity], share_of: CostModel, smallest: float) -> float:
    """A checked target as a fraction of what the dense model has; `smallest` is the least that can be reached.

    Raises:
        BadInput: text says no quantity, or it is not less than the dense model has or less than can be reached. The
            line says both.
    """
    ((cost, asked),) = target.items()
    has = f"the smallest is {smallest:.4f} ({share_of.said(smallest)}); the dense model has {share_of.said(1.0)}"
    try:
        number = number_of(asked)
    except ValueError as error:
        raise BadInput(f"prune.target.{cost}: {error}; {has}") from None
    absolute = cost == "latency_ms" or number > 1
    words = share_of.said(number / share_of.whole) if absolute else f"{number:g} of the dense model"
    fraction = number / share_of.whole if absolute else number
    if fraction >= 1:
        raise BadInput(f"prune.target: {words} is not less than the dense model has; {has}")
    if fraction < smallest:
        raise BadInput(f"prune.target: {words} cannot be reached, {has}")
    return fraction


def relative(sparsity: Mapping[str, float]) -> dict[str, float]:
    """Shares of the kinds among each other, the largest being 1.

    Raises:
        BadInput: one is negative or not a number, or all are 0.
    """
    wrong = [kind for kind, share in sparsity.items() if not 0 <= share < math.inf]
    if wrong:
        raise BadInput(f"prune.sparsity.{wrong[0]}: {sparsity[wrong[0]]} is no share; beside a target, give 0 or more")
    largest = max(sparsity.values(), default=0.0)
    if not largest:
        raise BadInput("prune.sparsity: nothing may go, so no target is reached; give a share above 0 or null")
    return {kind: share / largest for kind, share in sparsity.items()}


def make_cost_model(model: nn.Module, groups: Sequence[Group], cost: str) -> CostModel:
    """What candidates cost: really shrunk copies of the dense model; single weights by their non-zeros.

    Parameters and MACs are counted on copies without data. Latency is measured, each time in turns with the dense
    model; a copy of it is kept for that.
    """
    return _counter(model, groups, cost) if cost in COUNTS else _clock(copy.deepcopy(model), groups, cost)


def solve(masks_at: Callable[[float], Masks], share_of: CostFn, limit: float, precision: float = 1e-9) -> float:
    """The least scalar from 0 to 1 whose masks cost no more than the limit, by bisection.

    `masks_at` must remove more, and never other units, as its scalar grows; then the cost found is less than one step
    of every pool below the limit: a unit, or what `round_to` lets go at once.

    Raises:
        BadInput: the limit is not reached where all goes that may go; the line says what is.
    """
    return bisect(masks_at, share_of, limit, precision)[1]


def bisect(
    masks_at: Callable[[float], Masks], share_of: CostFn, limit: float, precision: float = 1e-9
) -> tuple[float, float]:
    """The scalar of `solve` behind one whose masks are the next ones, which cost too much; twice 0 where none do."""
    low, high = 0.0, math.nextafter(1.0, 0.0)
    fewest = _left(masks_at(high))
    smallest = share_of(masks_at(high))
    if smallest > limit:
        raise BadInput(f"prune.target: {limit:g} of the dense model cannot be reached, the smallest is {smallest:.4f}")
    most = _left(masks_at(low))
    if share_of(masks_at(low)) <= limit:
        return low, low
    while high - low > precision and most - fewest > 1:
        middle = (low + high) / 2
        masks = masks_at(middle)
        left = _left(masks)
        if left == fewest or (left != most and share_of(masks) <= limit):
            high, fewest = middle, left
        else:
            low, most = middle, left
    return low, high


def refine_latency(
    masks_at: Callable[[float], Masks], read: CostFn, limit: float, scalar: float
) -> tuple[float, float]:
    """The scalar that a search by short readings has found, corrected by long ones, and what the clock said of it.

    A search takes the readings that happen to be low for what they are, so it ends too early. Each try goes along a
    line from the dense model to the smallest; the best is the largest reading below the limit.
    """
    slope = max(1 - read(masks_at(math.nextafter(1.0, 0.0))), CLOSE)
    tried: dict[float, float] = {}
    for _ in range(TRIES):
        tried[scalar] = read(masks_at(scalar))
        if limit * (1 - CLOSE) <= tried[scalar] <= limit:
            break
        aim = limit * (1 - CLOSE / 2)
        scalar = min(max(scalar + (tried[scalar] - aim) / slope, 0.0), math.nextafter(1.0, 0.0))
    below = [one for one, reading in tried.items() if reading <= limit]
    best = max(below, key=tried.__getitem__) if below else min(tried, key=tried.__getitem__)
    return best, tried[best]


def step_between(groups: Sequence[Group], more: Masks, fewer: Masks, share_of: CostModel) -> str:
    """Which units go together as the last ones, and what it would cost if they did not, in words."""
    units = {g.name: int(more[g.name].sum()) - int(fewer[g.name].sum()) for g in groups}
    cut = [group for group in groups if units[group.name]]
    if not cut:
        return "what the rules remove comes to that, and nothing else has to go"
    where = cut[0].name if len(cut) == 1 else f"{len(cut)} groups of kind {', '.join({g.kind: 0 for g in cut})}"
    cost = share_of(more)
    return (
        f"the last {sum(units.values())} units go together, of {where}, and without that step it would be "
        f"{cost:.4f} ({share_of.said(cost)})"
    )


def explain_miss(limit: float, reached: float, share_of: CostModel, last: str) -> str:
    """Why a cost is not within 2 % of its limit, in words; empty where it is.

    Both are fractions of the dense model's cost, and `last` says what the last step was.
    """
    if abs(reached / limit - 1) <= CLOSE:
        return ""
    off = f"{reached:.4f} ({share_of.said(reached)}) is {abs(reached / limit - 1):.1%}"
    if reached > limit:
        return f"{off} above the target: {last or 'the masks were not chosen for it'}"
    return f"{off} below the target: {last or 'what goes together, by scope, round_to and rules, is larger than that'}"


def _left(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _counter(model: nn.Module, groups: Sequence[Group], cost: str) -> CostModel:
    small, example = meta_copy(model), example_input(model, 1).to("meta")
    units = [group for group in groups if group.kind != "weight"]
    weights = {g.name: model.get_parameter(g.name).detach().cpu() != 0 for g in groups if g.kind == "weight"}
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())

    def counted(masks: Masks) -> float:
        smaller = shrink(copy.deepcopy(small), units, masks) if units else small
        if cost == "params" and weights:
            return nonzero - sum(int((there & ~masks[name]).sum()) for name, there in weights.items())
        if cost == "params":
            return sum(parameter.numel() for parameter in smaller.parameters())
        total, per_layer = count_macs(smaller, example)
        return total - sum(
            per_layer.get(n.removesuffix(".weight"), 0) * _zeros(w, masks[n]) for n, w in weights.items()
        )

    whole = counted({group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups})
    return CostModel(cost, whole, lambda masks: counted(masks) / whole)


def _zeros(there: Tensor, mask: Tensor) -> float:
    return 1 - int((there & mask).sum()) / there.numel()


def _clock(dense: nn.Module, groups: Sequence[Group], cost: str) -> CostModel:
    example = example_input(dense, 1)

    def both(masks: Masks, runs: int) -> Spread:
        whole, part = latency([dense, shrink(copy.deepcopy(dense), groups, masks)], example, runs)
        return {"median": part["median"], "p10": part["p10"], "p90": part["p90"], "dense": whole["median"]}

    def share(masks: Masks) -> float:
        times = both(masks, RUNS)
        return times["median"] / times["dense"]

    return CostModel(cost, latency([dense], example, LONG)[0]["median"], share, lambda masks: both(masks, LONG))
