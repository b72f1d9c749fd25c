"""How much to remove for a model of a given cost: parameters, MACs or latency as a fraction of the dense model's."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.data import example_input
from vitprune.errors import BadInput
from vitprune.evaluate import latency, macs
from vitprune.groups import Group, Masks, shrink

COSTS = ("params", "macs", "latency")
PRECISION = {"params": 1e-9, "macs": 1e-9, "latency": 0.01}  # of the scalar; what a clock says is no finer
RUNS = 15  # forward passes of each model behind a latency
Meter = Callable[[Masks], float]  # masks of the dense model's groups -> cost as a fraction of the dense model's


def check(target: Mapping[str, float], kinds: Sequence[str]) -> None:
    """Refuse a target that is not one cost and a fraction.

    Raises:
        BadInput: it names no cost or several, an unknown one, a fraction outside 0..1, or the latency of zeros.
    """
    if len(target) != 1:
        raise BadInput(f"prune.target: names {len(target)} costs; give one of {', '.join(COSTS)}")
    ((cost, fraction),) = target.items()
    if cost not in COSTS:
        raise BadInput(f"prune.target.{cost}: unknown; use one of {', '.join(COSTS)}")
    if not 0 < fraction < 1:
        raise BadInput(f"prune.target.{cost}: {fraction} is not above 0 and below 1 (the fraction of the dense model)")
    if cost == "latency" and "weight" in kinds:
        raise BadInput("prune.target.latency: single weights become zeros, which take as long; use params or macs")


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


def meter(model: nn.Module, groups: Sequence[Group], cost: str) -> Meter:
    """What candidates cost: really shrunk copies of the dense model; single weights by their non-zeros.

    Parameters and MACs are counted on copies without data. Latency is measured, each time in turns with the dense
    model; a copy of it is kept for that.
    """
    return _clock(copy.deepcopy(model), groups) if cost == "latency" else _counter(model, groups, cost)


def solve(masks_at: Callable[[float], Masks], share_of: Meter, limit: float, precision: float = 1e-9) -> float:
    """The least scalar from 0 to 1 whose masks cost no more than the limit, by bisection.

    `masks_at` must remove more, and never other units, as its scalar grows; then the cost found is less than one unit
    of every pool below the limit.

    Raises:
        BadInput: the limit is not reached where all goes that may go; the line says what is.
    """
    low, high = 0.0, math.nextafter(1.0, 0.0)
    fewest = _left(masks_at(high))
    smallest = share_of(masks_at(high))
    if smallest > limit:
        raise BadInput(f"prune.target: {limit:g} of the dense model cannot be reached, the smallest is {smallest:.4f}")
    most = _left(masks_at(low))
    if share_of(masks_at(low)) <= limit:
        return low
    while high - low > precision and most - fewest > 1:
        middle = (low + high) / 2
        masks = masks_at(middle)
        left = _left(masks)
        if left == fewest or (left != most and share_of(masks) <= limit):
            high, fewest = middle, left
        else:
            low, most = middle, left
    return high


def _left(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _frame(model: nn.Module) -> nn.Module:
    """A copy of a model with its shapes alone: on the meta device, where nothing is stored."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _counter(model: nn.Module, groups: Sequence[Group], cost: str) -> Meter:
    frame, example = _frame(model), example_input(model, 1).to("meta")
    units = [group for group in groups if group.kind != "weight"]
    weights = {g.name: model.get_parameter(g.name).detach().cpu() != 0 for g in groups if g.kind == "weight"}
    nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())

    def counted(masks: Masks) -> float:
        smaller = shrink(copy.deepcopy(frame), units, masks) if units else frame
        if cost == "params" and weights:
            return nonzero - sum(int((there & ~masks[name]).sum()) for name, there in weights.items())
        if cost == "params":
            return sum(parameter.numel() for parameter in smaller.parameters())
        total, per_layer = macs(smaller, example)
        return total - sum(
            per_layer.get(n.removesuffix(".weight"), 0) * _zeros(w, masks[n]) for n, w in weights.items()
        )

    whole = counted({group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups})
    return lambda masks: counted(masks) / whole


def _zeros(there: Tensor, mask: Tensor) -> float:
    return 1 - int((there & mask).sum()) / there.numel()


def _clock(dense: nn.Module, groups: Sequence[Group]) -> Meter:
    example = example_input(dense, 1)

    def share(masks: Masks) -> float:
        smaller = shrink(copy.deepcopy(dense), groups, masks)
        whole, part = (times["median"] for times in latency([dense, smaller], example, RUNS))
        return part / whole

    return share
