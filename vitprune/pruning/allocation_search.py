"""Search how much of every group is removed, by the KL divergence from the unpruned model on held-out images."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.criteria import Batches, Update
from vitprune.errors import BadInput
from vitprune.evaluation.logits import logits_of
from vitprune.evaluation.losses import kl_divergence
from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.apply_masks import apply_masks
from vitprune.pruning.block_steps import to_dense_names
from vitprune.pruning.constraints import UNCONSTRAINED, Constraint, Constraints
from vitprune.pruning.cost_target import least_scalar
from vitprune.pruning.cycle_masks import (
    CycleMasks,
    CycleState,
    constraints_for,
    cost_limit,
    cycle_target,
    groups_for,
    scores_in_dense,
    select_cycle_masks,
)
from vitprune.pruning.evolution_strategy import minimize, population_of
from vitprune.pruning.macs_scope import macs_per_unit
from vitprune.pruning.plan import Plan

WIDTHS = 32  # different widths of a group in the search, so that weight updates can be used again
PRECISION = 1e-4  # of the share of the MACs that a candidate removes
Select = Callable[[Scores], Masks]  # scores and masks in the dense model's indices


def allocated_cycle_masks(
    model: nn.Module, scores: Scores, plan: Plan, state: CycleState, batches: Batches
) -> CycleMasks:
    """Select the masks of a cycle, after a search for the sparsity of every group if the plan says so.

    The search multiplies the scores of every group by a factor; the order of units inside a group stays the same.
    Scores and weight updates of the search come from every second image, so that no image that an update has seen
    judges it. The masks are then selected from `scores`, those of all images, times the best factors.

    Args:
        model: The model before the cycle.
        scores: Scores of its units, by its own group names.
        plan: The pruning plan.
        state: State before the cycle.
        batches: Calibration batches; labels are not used by the search.

    Raises:
        BadInput: as `select_cycle_masks`, or there are too few images or evaluations.

    Source: SnapViT (Simoncini et al. 2025), one factor per group by an evolution strategy; held-out images are ours.
    """
    config = plan.config.allocation
    if config is None:
        return select_cycle_masks(model, scores, plan, state, batches)
    fit, judge = halves(batches)
    needed, groups = 1 + population_of(len(state.groups)), len(state.groups)
    if config.evaluations < needed:
        raise BadInput(f"prune.allocation.evaluations {config.evaluations}: {groups} groups need at least {needed}")
    search = AllocationSearch(model, plan, state, fit, judge)
    seed = plan.seed + state.number
    best = minimize(search.nats, len(search.groups), config.evaluations, seed, config.spread, "searching widths")
    factors = search.factors(best.point)
    selected = select_cycle_masks(model, _scaled(scores, factors), plan, state, batches)
    facts = {"nats_before": best.start, "nats_after": best.value, "evaluations": best.evaluations}
    return replace(selected, allocation=facts)


def halves(batches: Batches) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Split batches into those of every second image and those of the others; no batch is empty.

    Raises:
        BadInput: there are fewer than two images.
    """
    parts: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
    first = 0
    for images, labels in batches:
        for number, part in enumerate(parts):
            rows = slice((number - first) % 2, None, 2)
            if len(images[rows]):
                part.append((images[rows], labels[rows]))
        first += len(images)
    if not parts[1]:
        raise BadInput(f"prune.allocation: {first} calibration images; give at least 2, half of them are held out")
    return parts


class AllocationSearch:
    """Candidates of a search: factors per group -> KL divergence of the pruned model.

    Args:
        model: The model before the cycle.
        plan: The pruning plan.
        state: State before the cycle.
        fit: Batches for scores and weight updates.
        judge: Batches for the divergence.
    """

    def __init__(self, model: nn.Module, plan: Plan, state: CycleState, fit: Batches, judge: Batches):
        self._model, self._state = model, state
        self.groups = groups_for(model, plan)
        self._names = to_dense_names(state.groups, self.groups, state.masks)
        importance = plan.method.criterion(model, self.groups, fit, plan.context(state.number))
        self._scores, limit = importance.scores, plan.score.memory
        self._update = None if importance.update is None else ReusedUpdates(importance.update, limit)
        self._select = selector(plan, state)
        self._judge = [images for images, _ in judge]
        self._expected = self._logits(without_merging(model))

    def factors(self, point: np.ndarray) -> dict[str, float]:
        """Return the factor of every group for a point of the search, their logarithms."""
        return {group.name: math.exp(value) for group, value in zip(self.groups, point, strict=True)}

    def nats(self, point: np.ndarray) -> float:
        """Return the KL divergence of the model pruned with these factors, in nats per image."""
        scores = scores_in_dense(_scaled(self._scores, self.factors(point)), self._names, self._state)
        pruned = copy.deepcopy(self._model)
        apply_masks(pruned, self.groups, self._select(scores), self._state, self._update)
        return float(kl_divergence(self._logits(pruned), self._expected))

    def _logits(self, model: nn.Module) -> Tensor:
        return torch.cat(logits_of(model, self._judge)).double()


class ReusedUpdates:
    """An update that computes the values of a group once per width, as long as they fit into the memory.

    The order of the units inside a group never changes, so a width determines the mask.
    """

    def __init__(self, update: Update, limit: int):
        self._update, self._limit, self._bytes = update, limit, 0
        self._values: OrderedDict[tuple[str, int], dict[str, Tensor]] = OrderedDict()

    def __call__(self, masks: Masks) -> dict[str, Tensor]:
        """Return new values of the remaining weights, by parameter name."""
        result: dict[str, Tensor] = {}
        for name, mask in masks.items():
            key = (name, int(mask.sum()))
            if key not in self._values:
                self._add(key, {name: value.float() for name, value in self._update({name: mask}).items()})
            self._values.move_to_end(key)
            result |= self._values[key]
        return result

    def _add(self, key: tuple[str, int], values: dict[str, Tensor]) -> None:
        self._values[key] = values
        self._bytes += _bytes(values)
        while self._bytes > self._limit and len(self._values) > 1:
            self._bytes -= _bytes(self._values.popitem(last=False)[1])


def selector(plan: Plan, state: CycleState) -> Select:
    """Return a function that selects the masks of a cycle by scores, to meet the target with few different widths."""
    groups, costs, bounds = state.groups, state.costs, coarse(state.groups, constraints_for(plan, state))
    if costs.times or costs.model is None:
        share = next(iter(cycle_target({}, plan, state).target.values()))
        return lambda scores: costs.select(scores, share, groups, state.masks, bounds)
    limit, start = cost_limit(plan, state, costs.model), costs.model.start
    per_unit = costs.macs_per_unit if costs.model.cost == "macs" else macs_per_unit(groups, costs.model)

    def masks_at(scores: Scores, share: float) -> Masks:
        return costs.select(scores, share, groups, state.masks, bounds)

    def linear_cost(masks: Masks) -> float:
        removed = {group.name: int((~masks[group.name]).sum()) * group.shape[-1] / group.units for group in groups}
        return start - sum(per_unit[name] * units for name, units in removed.items())

    equal = {group.name: torch.zeros(group.shape) for group in groups}
    limit = max(limit, linear_cost(masks_at(equal, math.nextafter(1.0, 0.0))))  # few widths may not reach the target

    def selected(scores: Scores) -> Masks:
        return masks_at(scores, least_scalar(partial(masks_at, scores), linear_cost, limit, PRECISION)[1])

    if costs.model.cost == "macs":  # a share of the MACs has the same cost for all scores
        share = least_scalar(partial(masks_at, equal), linear_cost, limit, PRECISION)[1]
        return lambda scores: masks_at(scores, share)
    return selected


def coarse(groups: Sequence[Group], constraints: Constraints) -> dict[str, Constraint]:
    """Return constraints with multiples that leave at most 32 widths of a group; those that have a multiple stay."""
    result = dict(constraints)
    for group in groups:
        constraint = constraints.get(group.name, UNCONSTRAINED)
        wider = replace(constraint, multiple=max(1, group.shape[-1] // WIDTHS))
        fewest, most = wider.window(group.shape[-1])
        if constraint.multiple == 1 and not constraint.is_fixed and fewest <= most:
            result[group.name] = wider
    return result


def _scaled(scores: Scores, factors: Mapping[str, float]) -> Scores:
    return {name: score * factors.get(name, 1.0) for name, score in scores.items()}


def _bytes(values: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in values.values())
