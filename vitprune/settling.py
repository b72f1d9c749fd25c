"""Between scores and masks: where a method's scores leave in doubt who stays, it measures again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches
from vitprune.criteria.racing import Settled
from vitprune.depth import dense_names, living
from vitprune.groups import Group, Masks, Scores
from vitprune.plans import Plan
from vitprune.select import Contest, contests


def settle(
    model: nn.Module,
    now: Sequence[Group],
    batches: Batches,
    scores: Scores,
    dense: Sequence[Group],
    plan: Plan,
    target: Mapping[str, float],
    cycle: int = 1,
    kept: Masks | None = None,
) -> Settled:
    """Scores that tell who stays in a cycle: a method's own, measured again where it has a way to settle a doubt.

    `now` are the model's groups, `dense` those of the dense model; scores are in the dense model's places, here and in
    the result. `target` is the sparsity per kind that `choose` is to reach.
    """
    if plan.row.settle is None or "block" in target:
        return Settled(scores, {})
    alive = kept or {group.name: torch.ones(group.shape, dtype=torch.bool) for group in dense}
    names = dense_names(dense, now, alive)
    own = {names[group.name]: group for group in now if group.kind in target}
    left = {name: scores[name].flatten()[alive[name].flatten()] for name in own}
    of_now = {group.name: left[name].view(group.shape) for name, group in own.items()}
    fields = [_among_living(contest, alive, own) for contest in _contests(dense, plan, target, alive)]
    settled = plan.row.settle(model, list(own.values()), batches, of_now, fields, plan.setting_of(cycle))
    measured = [group for group in dense if group.name in own]
    back = {group.name: in_dense(group, settled.scores[own[group.name].name], alive) for group in measured}
    return Settled(scores | back, settled.facts)


def in_dense(group: Group, own: Tensor, kept: Masks) -> Tensor:
    """Scores of the living units at their places in the dense group; shape of the dense group."""
    full = torch.zeros(group.units, dtype=torch.float64)
    full[kept[group.name].flatten()] = own.flatten().to("cpu", torch.float64)
    return full.view(group.shape)


def _contests(dense: Sequence[Group], plan: Plan, target: Mapping[str, float], alive: Masks) -> list[Contest]:
    """The contests of `choose`, in the dense model's places."""
    found: list[Contest] = []
    for kind, share in target.items():
        same = [group for group in living(dense, alive) if group.kind == kind]
        shapes = {group.name: alive[group.name] for group in same}
        found += contests(shapes, share, plan.scope_of(kind), same, shapes, 1)
    return found


def _among_living(contest: Contest, alive: Masks, own: Mapping[str, Group]) -> Contest:
    """The same contest in the places of the model as it is."""
    places = []
    for name, units in contest.places:
        rank = alive[name].flatten().cumsum(0) - 1
        places.append((own[name].name, rank[units]))
    return Contest(tuple(places), contest.remove)
