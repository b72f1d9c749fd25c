"""Selection across kinds: all units of a model compete by what they are worth per MAC that they save."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.constraints import UNCONSTRAINED, Constraint, Constraints, middle, removal_steps
from vitprune.pruning.cost_target import CostFn

NO_BOUNDS: Constraints = {}
MacsPerUnit = dict[str, float]  # by group: the share of the dense model's MACs that one unit (of each head) saves


@dataclass(frozen=True)
class _Lot:
    """Units that go at once: one or as many as a multiple asks for, of attention channels the worst left of each head.

    All heads stay alike. The lot goes as long as `enough` of the budget is left.
    """

    rate: float
    price: float
    enough: float
    group: str
    units: Tensor


def macs_per_unit(groups: Sequence[Group], share_of: CostFn) -> MacsPerUnit:
    """What a unit of each group saves, measured on the dense model with one unit less.

    Raises:
        BadInput: a group's units cannot be bought one at a time (single weights, blocks).
    """
    whole = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    found: MacsPerUnit = {}
    for group in groups:
        if group.kind in ("weight", "block"):
            raise BadInput(f"{group.name}: units of kind {group.kind!r} have no price in MACs; use another scope")
        if group.shape[-1] < 2:  # the last one stays, so it is never for sale
            found[group.name] = 0.0
            continue
        less = whole[group.name].clone()
        less[..., 0] = False
        found[group.name] = 1 - share_of(whole | {group.name: less})
    return found


def select_by_macs(
    scores: Scores,
    share: float,
    groups: Sequence[Group],
    costs: MacsPerUnit,
    previous: Masks | None = None,
    bounds: Constraints = NO_BOUNDS,
) -> Masks:
    """Remove the units worth least per MAC until a share of all their MACs is gone; every group keeps one (per head).

    A larger share removes more, and never other units. What `previous` has removed stays removed and counts. `bounds`
    hold as in `select`: shares of a group are shares of its units, a group whose own is said is no part of the budget,
    and multiples are rounded towards the nearest sum of MACs.

    Raises:
        BadInput: the share is outside 0..1, or a score is NaN.

    Source: UP-ViTs' score as one currency, in nats, across blocks and components.
    """
    if not 0 <= share < 1:
        raise BadInput(f"sparsity {share}: must be at least 0 and below 1 (the fraction of MACs to remove)")
    masks = {
        g.name: torch.ones(g.shape, dtype=torch.bool) if previous is None else previous[g.name].view(g.shape).clone()
        for g in groups
    }
    budget, line = 0.0, list[_Lot]()
    for group in groups:
        own = bounds.get(group.name, UNCONSTRAINED)
        own = own if share or own.min_sparsity else replace(own, multiple=1)
        price = 0.0 if own.is_fixed else costs[group.name]
        gone = int((~masks[group.name]).sum()) / (group.units / group.shape[-1])
        budget += price * (share * group.shape[-1] - gone)
        line += _lots(group, scores[group.name], masks[group.name], price, own)
    for lot in sorted(line, key=attrgetter("rate")):
        if budget < lot.enough:
            break
        budget -= lot.price
        masks[lot.group].view(-1)[lot.units] = False
    return masks


def _lots(group: Group, scores: Tensor, alive: Tensor, price: float, bounds: Constraint) -> list[_Lot]:
    """What of a group can go, in the order in which it must: rates rise, so that a later lot never goes first."""
    if bool(scores.isnan().any()):
        raise BadInput(f"{group.name}: {int(scores.isnan().sum())} scores are NaN; check the model's weights")
    rows = scores.detach().cpu().double().reshape(-1, group.shape[-1])
    there = alive.reshape(rows.shape)
    left = int(there[0].sum())
    places = torch.arange(rows.numel()).view(rows.shape)
    order = torch.stack(
        [place[keep][row[keep].argsort(stable=True)] for place, row, keep in zip(places, rows, there, strict=True)]
    )
    worth = rows.flatten()[order].sum(dim=0).cummax(dim=0).values  # (left,), over the rows
    kept = bounds.kept(group.shape[-1], left, protected=1)
    found = []
    for lot in removal_steps(left, kept):
        units, size = order[:, lot[0] : lot[1]].flatten(), lot[1] - lot[0]
        if lot[0] == 0 and left > kept[-1]:
            found.append(_Lot(-math.inf, price * size, -math.inf, group.name, units))
        else:
            enough = price * size * (0.5 + 1e-9 if bounds.multiple > 1 else 1 - 1e-9)
            found.append(_Lot(float(worth[middle(lot)]) / price, price * size, enough, group.name, units))
    return found
