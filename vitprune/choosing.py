"""Who goes in a cycle: from scores, a plan and what candidates cost to masks in the dense model's coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from vitprune.budget import Prices, prices, spend
from vitprune.criteria import Batches
from vitprune.criteria.racing import Settled
from vitprune.depth import living
from vitprune.families import find_groups, merge_heads
from vitprune.groups import Group, Masks, Scores
from vitprune.plans import Plan
from vitprune.select import Contest, contests, select, select_blocks
from vitprune.targets import PRECISION, Meter, meter, solve


def groups_for(model: nn.Module, plan: Plan) -> list[Group]:
    """The groups that a plan prunes, heads merged where it says so."""
    return merge_heads(model, find_groups(model, list(plan.sparsity)), plan.heads)


@dataclass(frozen=True)
class Costs:
    """What candidates cost, where a plan has a target (`share_of`), and what a unit saves, where units are bought."""

    share_of: Meter | None = None
    prices: Prices = field(default_factory=dict)


FREE = Costs()


def choose(
    scores: Scores,
    groups: Sequence[Group],
    plan: Plan,
    target: Mapping[str, float],
    kept: Masks | None = None,
    costs: Costs = FREE,
) -> Masks:
    """Masks of one cycle, each kind by its own scope; structured groups keep at least one unit.

    What the cycles before have kept is in `kept`; None where there is none before. A kind that `target` does not name
    stays as it is. Blocks go first: what belongs to them goes too, and a share is one of what they leave.
    """
    masks = dict(kept) if kept else {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    bought = [group for group in groups if group.kind in plan.bought and group.kind in target]
    if bought:
        own = {group.name: scores[group.name] for group in bought}
        masks |= spend(own, target[bought[0].kind], bought, costs.prices, kept)
    for kind, share in sorted(target.items(), key=lambda pair: pair[0] != "block"):
        if kind in plan.bought:
            continue
        same = [group for group in living(groups, masks) if group.kind == kind]
        own = {group.name: scores[group.name] for group in same}
        if kind == "block":
            masks |= select_blocks(own, share, kept)
        else:
            masks |= select(own, share, plan.scope_of(kind), same, kept, 0 if kind == "weight" else 1)
    alive = {group.name for group in living(groups, masks)}
    return {name: mask if name in alive else torch.zeros_like(mask) for name, mask in masks.items()}


def goal(
    scores: Scores, groups: Sequence[Group], plan: Plan, number: int, costs: Costs, kept: Masks | None = None
) -> Mapping[str, float]:
    """Sparsity per kind after a cycle: the plan's own, or what its cost asks for."""
    if costs.share_of is None:
        return plan.targets()[number - 1]
    ((cost, limit),) = plan.costs()[number - 1].items()

    def masks_at(scalar: float) -> Masks:
        return choose(scores, groups, plan, plan.shares(scalar), kept, costs)

    return plan.shares(solve(masks_at, costs.share_of, limit, PRECISION[cost]))


def costs_for(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Costs:
    """What a plan has to know of costs; the model must still be the dense one."""
    bought = [group for group in groups if group.kind in plan.bought]
    return Costs(
        meter(model, groups, next(iter(plan.target))) if plan.target else None,
        prices(bought, meter(model, bought, "macs")) if bought else {},
    )


def cost_of(masks: Masks, plan: Plan, number: int, costs: Costs) -> dict[str, dict[str, float]]:
    """What a cycle was to cost and costs, as fractions of the dense model; empty where the plan has no cost."""
    if costs.share_of is None:
        return {}
    return {
        cost: {"target": limit, "reached": costs.share_of(masks)} for cost, limit in plan.costs()[number - 1].items()
    }


def settle(
    model: nn.Module,
    batches: Batches,
    scores: Scores,
    groups: Sequence[Group],
    plan: Plan,
    target: Mapping[str, float],
    cycle: int = 1,
    kept: Masks | None = None,
) -> Settled:
    """Scores that tell who stays in a cycle: a method's own, measured again where it has a way to settle a doubt.

    `scores` are of the units that the model still has, `groups` the dense model's, as for `choose`.
    """
    if plan.row.settle is None:
        return Settled(scores, {})
    alive = kept or {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    fields: list[Contest] = []
    for kind, share in target.items():
        same = [group for group in groups if group.kind == kind]
        own = {group.name: alive[group.name] for group in same}
        fields += contests(own, share, plan.scope_of(kind), same, kept, 1)
    place = {name: mask.flatten().cumsum(0) - 1 for name, mask in alive.items()}  # of a living unit in the model
    now = [Contest(tuple((name, place[name][units]) for name, units in c.places), c.remove) for c in fields]
    if not any(contest.remove for contest in now):
        return Settled(scores, {})
    found = [group for group in groups_for(model, plan) if group.kind in target]
    own = {group.name: scores[group.name] for group in found}
    return plan.row.settle(model, found, batches, own, now, plan.setting_of(cycle))
