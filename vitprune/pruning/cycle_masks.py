"""Who goes in a cycle: from scores, a plan and what candidates cost to masks in the dense model's coordinates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from vitprune.architectures import find_groups, merge_heads
from vitprune.criteria import Batches
from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.block_steps import living
from vitprune.pruning.constraints import AllBounds, nearest
from vitprune.pruning.cost_target import (
    COUNTS,
    PRECISION,
    Meter,
    Spread,
    bracket,
    fraction_of,
    is_fraction,
    meter,
    miss,
    steadied,
    step_between,
)
from vitprune.pruning.macs_scope import Prices, prices, spend
from vitprune.pruning.plan import Plan
from vitprune.pruning.rescoring import Settled
from vitprune.pruning.rules import bounds_of
from vitprune.pruning.select import Contest, blocks_removed, contests, select, select_blocks


def groups_for(model: nn.Module, plan: Plan) -> list[Group]:
    """The groups that a plan prunes, heads merged where it says so."""
    return merge_heads(model, find_groups(model, list(plan.sparsity)), plan.heads)


@dataclass(frozen=True)
class Costs:
    """What candidates cost, where a plan has a target (`share_of`), and what a unit saves, where units are bought.

    `final` is the target as a fraction of the dense model's cost.
    """

    share_of: Meter | None = None
    prices: Prices = field(default_factory=dict)
    final: float | None = None


@dataclass(frozen=True)
class Goal:
    """Sparsity per kind after a cycle and, where a cost decided, its last step in words."""

    target: Mapping[str, float]
    last: str = ""


FREE_COSTS = Costs()


def choose(
    scores: Scores,
    groups: Sequence[Group],
    plan: Plan,
    target: Mapping[str, float],
    kept: Masks | None = None,
    costs: Costs = FREE_COSTS,
    cycle: int | None = None,
) -> Masks:
    """Masks of one cycle, each kind by its own scope; structured groups keep at least one unit.

    What the cycles before have kept is in `kept`; None where there is none before. A kind that `target` does not name
    stays as it is. Blocks go first: what belongs to them goes too, and a share is one of what they leave. `cycle` is
    the one whose part of the plan's rules holds, None the last.
    """
    masks = dict(kept) if kept else {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    bounds = bounds_for(groups, plan, costs, cycle)
    bought = [group for group in groups if group.kind in plan.bought and group.kind in target]
    if bought:
        own = {group.name: scores[group.name] for group in bought}
        masks |= spend(own, target[bought[0].kind], bought, costs.prices, kept, bounds)
    for kind, share in sorted(target.items(), key=lambda pair: pair[0] != "block"):
        if kind in plan.bought:
            continue
        same = [group for group in living(groups, masks) if group.kind == kind]
        own = {group.name: scores[group.name] for group in same}
        if kind == "block":
            masks |= select_blocks(own, share, kept)
        else:
            masks |= select(own, share, plan.scope_of(kind), same, kept, 0 if kind == "weight" else 1, bounds)
    alive = {group.name for group in living(groups, masks)}
    return {name: mask if name in alive else torch.zeros_like(mask) for name, mask in masks.items()}


def bounds_for(groups: Sequence[Group], plan: Plan, costs: Costs, cycle: int | None = None) -> AllBounds:
    """Bounds of single groups after a cycle, None the last.

    Raises:
        BadInput: a rule fits no group, or a group cannot be within its bounds.
    """
    return bounds_of(groups, plan.rules, plan.round_to, plan.progress(cycle or plan.cycles, costs.final))


def goal(
    scores: Scores, groups: Sequence[Group], plan: Plan, number: int, costs: Costs, kept: Masks | None = None
) -> Goal:
    """What a cycle is to remove: the plan's own sparsities, or what its cost asks for."""
    bounds = bounds_for(groups, plan, costs, number)
    if costs.share_of is None:
        return Goal(_of_blocks(plan.targets()[number - 1], groups, bounds))
    ((cost, limit),) = plan.costs(costs.final)[number - 1].items()

    def shares(scalar: float) -> Mapping[str, float]:
        return _of_blocks(plan.shares(scalar), groups, bounds)

    def masks_at(scalar: float) -> Masks:
        return choose(scores, groups, plan, shares(scalar), kept, costs, number)

    low, high = bracket(masks_at, costs.share_of, limit, PRECISION[cost])
    if (spread := costs.share_of.spread) is not None:
        whole = costs.share_of.whole
        high, reading = steadied(masks_at, lambda masks: _by_clock(cost, spread(masks), whole), limit, high)
        return Goal(shares(high), f"the clock said {reading:.4f} when it was chosen, the nearest of what was tried")
    return Goal(shares(high), step_between(groups, masks_at(low), masks_at(high), costs.share_of))


def _by_clock(cost: str, times: Spread, whole: float) -> float:
    """What a clock says: milliseconds count as they are now, a fraction is one of the dense model beside it."""
    return times["median"] / (whole if cost == "latency_ms" else times["dense"])


def _of_blocks(target: Mapping[str, float], groups: Sequence[Group], bounds: AllBounds) -> Mapping[str, float]:
    """A target with the share of blocks that their bounds allow; of units, `select` sees to it."""
    found = dict(target)
    for group in groups:
        if group.kind == "block" and group.name in bounds and "block" in target:
            blocks = group.units // 2
            stay = nearest(bounds[group.name].kept(blocks, blocks, 1), blocks - blocks_removed(target["block"], blocks))
            found["block"] = 1 - stay / blocks
    return found


def costs_for(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Costs:
    """What a plan has to know of costs; the model must still be the dense one.

    Raises:
        BadInput: the plan's target is none for this model, or its rules are none.
    """
    bounds = bounds_for(groups, plan, FREE_COSTS)
    bought = [group for group in groups if group.kind in plan.bought]
    costs = Costs(prices=prices(bought, meter(model, bought, "macs")) if bought else {})
    if plan.target is None:
        return costs
    share_of = meter(model, groups, next(iter(plan.target)))
    alike = {group.name: torch.zeros(group.shape) for group in groups}
    most = _of_blocks(plan.shares(math.nextafter(1.0, 0.0)), groups, bounds)
    final = fraction_of(plan.target, share_of, share_of(choose(alike, groups, plan, most, costs=costs)))
    plan.costs(final)
    return replace(costs, share_of=share_of, final=final)


def cost_of(masks: Masks, plan: Plan, number: int, costs: Costs, last: str = "") -> dict[str, dict[str, float | str]]:
    """What a cycle was to cost and costs, in the unit of the target; empty where the plan has no cost.

    An absolute target comes with what the dense model has, and latencies with their spread in ms (p10 and p90). Where
    more than 2 % lie between the two, `why` says what is in the way, `last` being the goal's last step.
    """
    if costs.share_of is None or plan.target is None:
        return {}
    ((cost, limit),) = plan.costs(costs.final)[number - 1].items()
    times = costs.share_of.spread(masks) if costs.share_of.spread is not None else {}
    reached = _by_clock(cost, times, costs.share_of.whole) if times else costs.share_of(masks)
    found: dict[str, float | str] = {"target": limit, "reached": reached}
    if not is_fraction(plan.target):
        whole, digits = costs.share_of.whole, None if cost in COUNTS else 6
        found = {"target": round(limit * whole, digits), "reached": round(reached * whole, digits), "dense": whole}
    found |= {name: times[name] for name in ("p10", "p90") if name in times}
    if times:
        drift = f"the dense model takes {times['dense']:.4g} ms beside it and took {costs.share_of.whole:.4g} ms before"
        last = f"{drift}; {last}" if last else drift
    why = miss(limit, reached, costs.share_of, last)
    return {cost: found | ({"why": why} if why else {})}


def settle(
    model: nn.Module,
    batches: Batches,
    scores: Scores,
    groups: Sequence[Group],
    plan: Plan,
    target: Mapping[str, float],
    cycle: int = 1,
    kept: Masks | None = None,
    costs: Costs = FREE_COSTS,
) -> Settled:
    """Scores that tell who stays in a cycle: a method's own, measured again where it has a way to settle a doubt.

    `scores` are of the units that the model still has, `groups` the dense model's, as for `choose`.
    """
    if plan.row.settle is None:
        return Settled(scores, {})
    alive = kept or {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    bounds = bounds_for(groups, plan, costs, cycle)
    fields: list[Contest] = []
    for kind, share in target.items():
        same = [group for group in groups if group.kind == kind]
        own = {group.name: alive[group.name] for group in same}
        fields += contests(own, share, plan.scope_of(kind), same, kept, 1, bounds)
    place = {name: mask.flatten().cumsum(0) - 1 for name, mask in alive.items()}  # of a living unit in the model
    now = [Contest(tuple((name, place[name][units]) for name, units in c.places), c.remove) for c in fields]
    if not any(contest.remove for contest in now):
        return Settled(scores, {})
    found = [group for group in groups_for(model, plan) if group.kind in target]
    own = {group.name: scores[group.name] for group in found}
    return plan.row.settle(model, found, batches, own, now, plan.setting_of(cycle))
