"""Select units of all kinds together, ranked by importance per MAC saved (scope macs)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.groups import REMOVED, Group, Masks, Scores, all_units
from vitprune.pruning.constraints import UNCONSTRAINED, Constraint, Constraints, middle, removal_steps
from vitprune.pruning.cost_target import CostFn

MacsPerUnit = dict[str, float]  # by group: fraction of the dense model's MACs that one unit (of every head) saves


@dataclass(frozen=True)
class _RemovalStep:
    """Units of a group that are removed together: one or a multiple, for attention channels in every head alike."""

    rate: float  # importance per MAC saved; steps are removed in ascending order
    macs: float  # saved, as a fraction of the dense model's
    min_budget: float  # the step is removed if at least this much of the budget is left
    group: str
    units: Tensor  # flat indices


def macs_per_unit(groups: Sequence[Group], share_of: CostFn) -> MacsPerUnit:
    """Measure the MACs that one unit of each group saves, on the model without this unit.

    Raises:
        BadInput: the units of a group do not save MACs one at a time (single weights, blocks, branches).
    """
    units = all_units(groups)
    savings, all_macs = MacsPerUnit(), share_of(units)
    for group in groups:
        if group.kind in ("weight", *REMOVED):
            raise BadInput(f"{group.name}: scope macs cannot rank units of kind {group.kind!r}; use another scope")
        if group.shape[-1] < 2:  # the only unit cannot be removed
            savings[group.name] = 0.0
            continue
        one_less = units[group.name].clone()
        one_less[..., 0] = False
        savings[group.name] = all_macs - share_of(units | {group.name: one_less})
    return savings


def select_by_macs(
    scores: Scores, share: float, groups: Sequence[Group], costs: MacsPerUnit, previous: Masks, bounds: Constraints
) -> Masks:
    """Remove the units with the least importance per MAC until a share of the MACs of all units is removed.

    A larger share removes a superset of the units. Every group keeps a unit (per head).

    Args:
        scores: Scores by group.
        share: Fraction of the MACs of all units to remove.
        groups: The groups.
        costs: MACs that one unit of each group saves.
        previous: Masks of the cycle before. Units that they remove remain removed, and count as removed.
        bounds: Constraints of single groups, as in `select`. Sparsities are fractions of a group's units, groups of
            fixed sparsity are not part of the budget, and multiples are rounded to the nearest sum of MACs.

    Raises:
        BadInput: the share is outside 0..1, or a score is NaN.

    Source: UP-ViTs' score, whose unit (nats) is the same for all blocks and components.
    """
    if not 0 <= share < 1:
        raise BadInput(f"sparsity {share}: must be at least 0 and below 1 (the fraction of MACs to remove)")
    masks = masks_before(groups, previous)
    budget, steps = 0.0, list[_RemovalStep]()
    for group in groups:
        constraint = bounds.get(group.name, UNCONSTRAINED)
        constraint = constraint if share or constraint.min_sparsity else replace(constraint, multiple=1)
        macs = 0.0 if constraint.is_fixed else costs[group.name]
        removed = int((~masks[group.name]).sum()) / (group.units / group.shape[-1])
        budget += macs * (share * group.shape[-1] - removed)
        steps += _removal_steps(group, scores[group.name], masks[group.name], macs, constraint)
    for step in sorted(steps, key=attrgetter("rate")):
        if budget < step.min_budget:
            break
        budget -= step.macs
        masks[step.group].view(-1)[step.units] = False
    return masks


def masks_before(groups: Sequence[Group], previous: Masks) -> Masks:
    """Return a copy of the masks of the cycle before, in the shapes of the groups."""
    return {group.name: previous[group.name].view(group.shape).clone() for group in groups}


def removal_order(group: Group, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the remaining units in the order of their removal, and the importance of each step.

    Args:
        group: The group.
        scores: Its scores.
        mask: Its remaining units, of every row (head) the same number.

    Returns:
        Flat indices (rows, left), of which every step removes a column, and importance (left,), summed over the rows
        and never decreasing.

    Raises:
        BadInput: a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise BadInput(f"{group.name}: {int(scores.isnan().sum())} scores are NaN; check the model's weights")
    rows = scores.detach().cpu().double().reshape(-1, group.shape[-1])
    row_masks = mask.reshape(rows.shape)
    indices = torch.arange(rows.numel()).view(rows.shape)
    parts = zip(indices, rows, row_masks, strict=True)
    order = torch.stack([index[keep][row[keep].argsort(stable=True)] for index, row, keep in parts])
    return order, rows.flatten()[order].sum(dim=0).cummax(dim=0).values


def _removal_steps(
    group: Group, scores: Tensor, mask: Tensor, macs: float, constraint: Constraint
) -> list[_RemovalStep]:
    """Return the possible removals of a group in order; rates never decrease, so sorting keeps the order."""
    order, importance = removal_order(group, scores, mask)
    left = order.shape[1]
    kept = constraint.kept(group.shape[-1], left, protected=1)
    result = []
    for step in removal_steps(left, kept):
        units, size = order[:, step[0] : step[1]].flatten(), step[1] - step[0]
        rate = min_budget = -math.inf
        if step[0] > 0 or left <= kept[-1]:  # not mandatory
            min_budget = macs * size * (0.5 + 1e-9 if constraint.multiple > 1 else 1 - 1e-9)
            rate = float(importance[middle(step)]) / macs
        result.append(_RemovalStep(rate, macs * size, min_budget, group.name, units))
    return result
