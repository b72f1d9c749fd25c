"""Who goes in a cycle: from scores, a plan and what candidates cost to masks in the dense model's coordinates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from vitprune.architectures import find_groups, merge_heads
from vitprune.criteria import Batches
from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.block_steps import remaining_groups
from vitprune.pruning.constraints import Constraints, nearest
from vitprune.pruning.cost_target import (
    COUNTS,
    PRECISION,
    CostModel,
    Spread,
    bisect,
    explain_miss,
    fraction_of,
    is_fraction,
    make_cost_model,
    refine_latency,
    step_between,
)
from vitprune.pruning.macs_scope import MacsPerUnit, macs_per_unit, select_by_macs
from vitprune.pruning.plan import Plan
from vitprune.pruning.rescoring import Rescored
from vitprune.pruning.rules import bounds_of
from vitprune.pruning.select import CandidatePool, blocks_removed, candidate_pools, select, select_blocks


def groups_for(model: nn.Module, plan: Plan) -> list[Group]:
    """The groups that a plan prunes, heads merged where it says so."""
    return merge_heads(model, find_groups(model, list(plan.sparsity)), plan.merge_heads_to)


@dataclass(frozen=True)
class Costs:
    """What candidates cost, where a plan has a target (`share_of`), and what a unit saves, where units are bought.

    `final` is the target as a fraction of the dense model's cost.
    """

    share_of: CostModel | None = None
    macs_per_unit: MacsPerUnit = field(default_factory=dict)
    final: float | None = None


@dataclass(frozen=True)
class CycleTarget:
    """Sparsity per kind after a cycle and, where a cost decided, its last step in words."""

    target: Mapping[str, float]
    last: str = ""


FREE_COSTS = Costs()


def select_masks(
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
    bounds = constraints_for(groups, plan, costs, cycle)
    macs_kinds = [group for group in groups if group.kind in plan.macs_kinds and group.kind in target]
    if macs_kinds:
        own = {group.name: scores[group.name] for group in macs_kinds}
        masks |= select_by_macs(own, target[macs_kinds[0].kind], macs_kinds, costs.macs_per_unit, kept, bounds)
    for kind, share in sorted(target.items(), key=lambda pair: pair[0] != "block"):
        if kind in plan.macs_kinds:
            continue
        same = [group for group in remaining_groups(groups, masks) if group.kind == kind]
        own = {group.name: scores[group.name] for group in same}
        if kind == "block":
            masks |= select_blocks(own, share, kept)
        else:
            masks |= select(own, share, plan.scope_of(kind), same, kept, 0 if kind == "weight" else 1, bounds)
    alive = {group.name for group in remaining_groups(groups, masks)}
    return {name: mask if name in alive else torch.zeros_like(mask) for name, mask in masks.items()}


def constraints_for(groups: Sequence[Group], plan: Plan, costs: Costs, cycle: int | None = None) -> Constraints:
    """Bounds of single groups after a cycle, None the last.

    Raises:
        BadInput: a rule fits no group, or a group cannot be within its bounds.
    """
    return bounds_of(groups, plan.rules, plan.round_to, plan.progress(cycle or plan.cycles, costs.final))


def cycle_target(
    scores: Scores, groups: Sequence[Group], plan: Plan, number: int, costs: Costs, kept: Masks | None = None
) -> CycleTarget:
    """What a cycle is to remove: the plan's own sparsities, or what its cost asks for."""
    bounds = constraints_for(groups, plan, costs, number)
    if costs.share_of is None:
        return CycleTarget(_of_blocks(plan.targets()[number - 1], groups, bounds))
    ((cost, limit),) = plan.costs(costs.final)[number - 1].items()

    def shares(scalar: float) -> Mapping[str, float]:
        return _of_blocks(plan.shares(scalar), groups, bounds)

    def masks_at(scalar: float) -> Masks:
        return select_masks(scores, groups, plan, shares(scalar), kept, costs, number)

    low, high = bisect(masks_at, costs.share_of, limit, PRECISION[cost])
    if (spread := costs.share_of.spread) is not None:
        whole = costs.share_of.whole
        high, reading = refine_latency(masks_at, lambda masks: _by_clock(cost, spread(masks), whole), limit, high)
        return CycleTarget(
            shares(high), f"the clock said {reading:.4f} when it was chosen, the nearest of what was tried"
        )
    return CycleTarget(shares(high), step_between(groups, masks_at(low), masks_at(high), costs.share_of))


def _by_clock(cost: str, times: Spread, whole: float) -> float:
    """What a clock says: milliseconds count as they are now, a fraction is one of the dense model beside it."""
    return times["median"] / (whole if cost == "latency_ms" else times["dense"])


def _of_blocks(target: Mapping[str, float], groups: Sequence[Group], bounds: Constraints) -> Mapping[str, float]:
    """A target with the share of blocks that their bounds allow; of units, `select` sees to it."""
    found = dict(target)
    for group in groups:
        if group.kind == "block" and group.name in bounds and "block" in target:
            blocks = group.units // 2
            stay = nearest(bounds[group.name].kept(blocks, blocks, 1), blocks - blocks_removed(target["block"], blocks))
            found["block"] = 1 - stay / blocks
    return found


def cost_model_for(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Costs:
    """What a plan has to know of costs; the model must still be the dense one.

    Raises:
        BadInput: the plan's target is none for this model, or its rules are none.
    """
    bounds = constraints_for(groups, plan, FREE_COSTS)
    macs_kinds = [group for group in groups if group.kind in plan.macs_kinds]
    costs = Costs(
        macs_per_unit=macs_per_unit(macs_kinds, make_cost_model(model, macs_kinds, "macs")) if macs_kinds else {}
    )
    if plan.target is None:
        return costs
    share_of = make_cost_model(model, groups, next(iter(plan.target)))
    alike = {group.name: torch.zeros(group.shape) for group in groups}
    most = _of_blocks(plan.shares(math.nextafter(1.0, 0.0)), groups, bounds)
    final = fraction_of(plan.target, share_of, share_of(select_masks(alike, groups, plan, most, costs=costs)))
    plan.costs(final)
    return replace(costs, share_of=share_of, final=final)


def reached_cost(
    masks: Masks, plan: Plan, number: int, costs: Costs, last: str = ""
) -> dict[str, dict[str, float | str]]:
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
    why = explain_miss(limit, reached, costs.share_of, last)
    return {cost: found | ({"why": why} if why else {})}


def rescore_borderline(
    model: nn.Module,
    batches: Batches,
    scores: Scores,
    groups: Sequence[Group],
    plan: Plan,
    target: Mapping[str, float],
    cycle: int = 1,
    kept: Masks | None = None,
    costs: Costs = FREE_COSTS,
) -> Rescored:
    """Scores that tell who stays in a cycle: a method's own, measured again where it has a way to settle a doubt.

    `scores` are of the units that the model still has, `groups` the dense model's, as for `choose`.
    """
    if plan.row.settle is None:
        return Rescored(scores, {})
    alive = kept or {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    bounds = constraints_for(groups, plan, costs, cycle)
    fields: list[CandidatePool] = []
    for kind, share in target.items():
        same = [group for group in groups if group.kind == kind]
        own = {group.name: alive[group.name] for group in same}
        fields += candidate_pools(own, share, plan.scope_of(kind), same, kept, 1, bounds)
    place = {name: mask.flatten().cumsum(0) - 1 for name, mask in alive.items()}  # of a living unit in the model
    now = [CandidatePool(tuple((name, place[name][units]) for name, units in c.places), c.remove) for c in fields]
    if not any(contest.remove for contest in now):
        return Rescored(scores, {})
    found = [group for group in groups_for(model, plan) if group.kind in target]
    own = {group.name: scores[group.name] for group in found}
    return plan.row.settle(model, found, batches, own, now, plan.setting_of(cycle))
