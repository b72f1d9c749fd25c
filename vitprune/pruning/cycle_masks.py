"""Select the masks of one pruning cycle from importance scores, the plan and the cost model.

Masks are indexed as in the dense model and cumulative: a unit that a cycle removes remains removed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vitprune.architectures import find_groups, merge_heads
from vitprune.architectures.token_merging import without_merging
from vitprune.criteria import Batches
from vitprune.criteria.obs.weight_blocks import pattern_refusal
from vitprune.errors import BadInput
from vitprune.evaluation.latency_table import read_latency_table
from vitprune.groups import REMOVED, Group, Masks, Scores, all_units
from vitprune.pruning.block_steps import next_block_removal, remaining_groups, to_dense_names
from vitprune.pruning.constraints import UNCONSTRAINED, Constraints, constraints_of, nearest
from vitprune.pruning.cost_target import (
    COUNTS,
    CostModel,
    Latencies,
    explain_miss,
    fraction_of,
    is_fraction,
    least_scalar,
    make_cost_model,
    refine_latency,
    step_between,
)
from vitprune.pruning.latency_scope import GroupTimes, select_by_latency
from vitprune.pruning.macs_scope import MacsPerUnit, macs_per_unit, select_by_macs
from vitprune.pruning.methods import Method
from vitprune.pruning.plan import Plan
from vitprune.pruning.rescoring import Rescored
from vitprune.pruning.select import CandidatePool, blocks_removed, candidate_pools, select, select_blocks
from vitprune.pruning.unusable_groups import scorable_groups

CostReport = Mapping[str, Mapping[str, float | str]]  # by cost: target, reached, dense, p10, p90, why


@dataclass(frozen=True)
class Costs:
    """Cost models of a plan.

    Attributes:
        model: Cost of a candidate, if the plan has a target.
        macs_per_unit: MACs that a unit saves, per group, for scope macs.
        times: Milliseconds of each group by width, for scope macs with a latency table.
        final: The target as a fraction of the dense model's cost.
    """

    model: CostModel | None = None
    macs_per_unit: MacsPerUnit = field(default_factory=dict)
    times: GroupTimes = field(default_factory=dict)
    final: float | None = None

    def select(
        self, scores: Scores, share: float, groups: Sequence[Group], masks: Masks, constraints: Constraints
    ) -> Masks:
        """Select masks for scope macs, by the latency table if there is one.

        Args:
            scores: Scores by group.
            share: Fraction to remove, see `select_by_latency` and `select_by_macs`.
            groups: The groups.
            masks: Masks of the cycle before.
            constraints: Constraints of single groups.
        """
        if self.times:
            return select_by_latency(scores, share, groups, self.times, masks, constraints)
        return select_by_macs(scores, share, groups, self.macs_per_unit, masks, constraints)


@dataclass(frozen=True)
class CycleState:
    """State of a pruning run before a cycle.

    Attributes:
        number: The cycle to prune next, from 1.
        masks: Masks after the cycle before; all units before the first.
        groups: Groups of the dense model.
        costs: Cost models, measured on the dense model.
    """

    number: int
    masks: Masks
    groups: Sequence[Group]
    costs: Costs


@dataclass(frozen=True)
class CycleMasks:
    """Masks of a cycle, and how they were selected.

    Attributes:
        masks: The masks.
        target: Sparsity per kind that was asked for.
        scores: Scores that selected the masks, indexed as in the dense model; zero for removed units.
        complete: Whether the cycle is complete. If it removes several blocks, they are removed one at a time, with new
            scores for each.
        facts: Figures about rescoring.
        last_step: The last removal that the cost target required, in words.
        allocation: Figures about the search for the sparsity of every group.
    """

    masks: Masks
    target: Mapping[str, float]
    scores: Scores = field(default_factory=dict)
    complete: bool = True
    facts: Mapping[str, float] = field(default_factory=dict)
    last_step: str = ""
    allocation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CycleTarget:
    """Sparsity per kind of a cycle and, with a cost target, its last removal in words."""

    target: Mapping[str, float]
    last_step: str = ""


def groups_for(model: nn.Module, plan: Plan) -> list[Group]:
    """Return the groups that a plan prunes: those that its method can score, with heads merged as the plan says."""
    groups = scorable_groups(model, all_groups(model, plan, list(plan.sparsity)), plan.method)
    return [group for group in groups if group.name not in plan.left_out]


def all_groups(model: nn.Module, plan: Plan, kinds: Sequence[str]) -> list[Group]:
    """Return the groups of some kinds, with attention heads merged as a plan says.

    Args:
        model: The model.
        plan: The pruning plan.
        kinds: Kinds of units.

    Returns:
        The groups, also those that the method of the plan cannot score.

    Raises:
        BadInput: the model has no group of a kind, or its heads cannot be merged.
    """
    return merge_heads(model, find_groups(model, kinds), plan.config.merge_heads_to)


def available_kinds(model: nn.Module, kinds: Sequence[str], method: Method) -> tuple[list[str], dict[str, str]]:
    """Split kinds into those that a method can prune in a model, and the others with the reason.

    Whole heads take the place of attention channels that cannot be pruned.

    Args:
        model: The model.
        kinds: Kinds of the method.
        method: The method.

    Returns:
        The available kinds, and the reason by name of a kind that is not available.
    """
    reasons = {kind: _why_unavailable(model, kind, method) for kind in kinds}
    available = [kind for kind, reason in reasons.items() if not reason]
    skipped = {kind: reason for kind, reason in reasons.items() if reason}
    heads = "attention" in skipped and "head" in method.scopes and "head" not in kinds
    if heads and not _why_unavailable(model, "head", method):
        available.append("head")
        skipped["attention"] = f"{skipped['attention'].partition(';')[0]}; whole heads are pruned instead"
    return available, skipped


def _why_unavailable(model: nn.Module, kind: str, method: Method) -> str:
    """Return why no group of a kind can be pruned; empty if one can."""
    try:
        groups = scorable_groups(model, find_groups(model, [kind]), method)
    except BadInput as error:
        return str(error)
    return "" if groups else "the model has no group of this kind"


def cycle_state(dense: nn.Module, plan: Plan, number: int = 1, masks: Masks | None = None) -> CycleState:
    """Return the state before a cycle.

    Args:
        dense: The dense model.
        plan: The pruning plan.
        number: The cycle to prune next.
        masks: Masks after the cycle before it; None before the first.

    Raises:
        BadInput: the model has no group of a kind, the target is out of its reach, or a rule does not fit it.
    """
    groups = groups_for(dense, plan)
    return CycleState(number, masks or all_units(groups), groups, costs_for(dense, groups, plan))


def select_cycle_masks(
    model: nn.Module, scores: Scores, plan: Plan, state: CycleState, batches: Batches = ()
) -> CycleMasks:
    """Select the masks of a cycle.

    Args:
        model: The model before the cycle.
        scores: Scores of its units, by its own group names.
        plan: The pruning plan.
        state: State before the cycle.
        batches: Calibration batches, for methods that rescore units near the threshold.

    Raises:
        BadInput: the target cannot be reached, or all scores of a kind are equal.
    """
    refuse_equal_scores(scores, groups_for(model, plan))
    names = to_dense_names(state.groups, groups_for(model, plan), state.masks)
    dense_scores = scores_in_dense(scores, names, state)
    wanted = cycle_target(dense_scores, plan, state)
    step = next_block_removal(state.groups, wanted.target, state.masks)
    rescored = _rescore(model, batches, scores, plan, step, state)
    if rescored.facts:
        dense_scores = scores_in_dense(rescored.scores, names, state)
    masks = select_masks(dense_scores, plan, step, state)
    return CycleMasks(masks, wanted.target, dense_scores, step == wanted.target, rescored.facts, wanted.last_step)


def refuse_equal_scores(scores: Scores, groups: Sequence[Group]) -> None:
    """Refuse scores that are equal for all units of a kind: units would be removed by their position.

    Raises:
        BadInput: the scores of a kind are equal.
    """
    for kind in dict.fromkeys(group.kind for group in groups):
        values = [scores[group.name].flatten() for group in groups if group.kind == kind and group.name in scores]
        low, high = min(float(value.min()) for value in values), max(float(value.max()) for value in values)
        units = sum(len(value) for value in values)
        if units > 1 and low == high and math.isfinite(low):  # units with an infinite score are kept
            raise BadInput(f"{kind}: all {units} scores are {low:g} and rank nothing; check weights, images and labels")


def given_masks(masks: Masks, plan: Plan, state: CycleState) -> CycleMasks:
    """Return the selection of a first cycle whose masks are known, such as those of the mask stage.

    Args:
        masks: The masks.
        plan: The pruning plan.
        state: State before the cycle.

    Returns:
        The masks, without scores. With a cost target, the sparsity per kind is that of the masks.
    """
    if state.costs.model is None:
        target = cycle_target({}, plan, state).target
        return CycleMasks(masks, target, complete=next_block_removal(state.groups, target, state.masks) == target)
    target = sparsity_per_kind(state.groups, masks)
    return CycleMasks(masks, target, complete=not set(REMOVED) & set(plan.sparsity))


def sparsity_per_kind(groups: Sequence[Group], masks: Masks) -> dict[str, float]:
    """Return the fraction of the units that masks remove, per kind."""
    result = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        units = torch.cat([masks[group.name].flatten() for group in groups if group.kind == kind])
        result[kind] = int((~units).sum()) / units.numel()
    return result


def scores_in_dense(scores: Scores, names: Mapping[str, str], state: CycleState) -> Scores:
    """Map the scores of a pruned model to the dense model's indices; removed units score 0.

    Args:
        scores: Scores by the pruned model's group names.
        names: The dense name of each of its groups.
        state: State with the masks of the pruned model.
    """
    by_dense_name = {dense_name: scores[name] for name, dense_name in names.items() if name in scores}
    return {group.name: _in_dense(group, by_dense_name, state.masks) for group in state.groups}


def _in_dense(group: Group, scores: Scores, masks: Masks) -> Tensor:
    if group.name not in scores:  # removed with its block
        return torch.zeros(group.shape, dtype=torch.float64)
    score = scores[group.name].to("cpu", torch.float64)
    if group.kind == "weight":
        return score
    full = torch.zeros(group.units, dtype=torch.float64)
    full[masks[group.name].flatten()] = score.flatten()
    return full.view(group.shape)


def select_masks(scores: Scores, plan: Plan, target: Mapping[str, float], state: CycleState) -> Masks:
    """Select masks for given sparsities, each kind by its own scope; every structured group keeps a unit.

    Blocks and branches are removed first, with all groups in them; the sparsity of a kind refers to the remaining
    groups. Kinds that `target` does not name keep their masks.

    Args:
        scores: Scores indexed as in the dense model.
        plan: The pruning plan.
        target: Sparsity per kind.
        state: State before the cycle.

    Returns:
        The masks of all groups of the dense model.
    """
    groups, masks = state.groups, dict(state.masks)
    constraints = constraints_for(plan, state)
    macs_kinds = [group for group in groups if group.kind in plan.macs_kinds and group.kind in target]
    if macs_kinds:
        by_name = {group.name: scores[group.name] for group in macs_kinds}
        masks |= state.costs.select(by_name, target[macs_kinds[0].kind], macs_kinds, state.masks, constraints)
    for kind, share in sorted(target.items(), key=lambda pair: pair[0] not in REMOVED):
        if kind in plan.macs_kinds:
            continue
        same = [group for group in remaining_groups(groups, masks) if group.kind == kind]
        by_name = {group.name: scores[group.name] for group in same}
        if kind == "block":
            masks |= select_blocks(by_name, share, state.masks)
        else:
            keep = 0 if kind == "weight" else 1
            masks |= select(by_name, share, plan.scope_of(kind), same, state.masks, keep, constraints)
    remaining = {group.name for group in remaining_groups(groups, masks)}
    return {name: mask if name in remaining else torch.zeros_like(mask) for name, mask in masks.items()}


def constraints_for(plan: Plan, state: CycleState) -> Constraints:
    """Return the constraints of single groups in a cycle.

    Raises:
        BadInput: a rule matches no group, or a group cannot satisfy its constraint.
    """
    progress = plan.progress(state.number, state.costs.final)
    return constraints_of(state.groups, plan.config.rules, plan.round_to, progress)


def cycle_target(scores: Scores, plan: Plan, state: CycleState) -> CycleTarget:
    """Return the sparsity per kind of a cycle: that of the plan, or the one that reaches the cost target."""
    constraints, model = constraints_for(plan, state), state.costs.model
    if model is None:
        return CycleTarget(_feasible_blocks(plan.targets()[state.number - 1], state.groups, constraints))
    limit = cost_limit(plan, state, model)

    def shares(scalar: float) -> Mapping[str, float]:
        return _feasible_blocks(plan.shares(scalar), state.groups, constraints)

    def masks_at(scalar: float) -> Masks:
        return select_masks(scores, plan, shares(scalar), state)

    if state.costs.times:  # a sum of times within a limit is selected directly
        saving = sum(float(times[-1] - times[1]) for times in state.costs.times.values())
        return CycleTarget(shares(min((1 - limit) * model.dense / saving, math.nextafter(1.0, 0.0))))
    low, high = least_scalar(masks_at, model, limit, model.precision)
    if (measure := model.latencies) is not None:
        high, latency = refine_latency(
            masks_at, lambda masks: _relative_latency(measure(masks), model), limit, high, model.start
        )
        return CycleTarget(shares(high), f"{latency:.4f} was measured at selection, the nearest of all tries")
    return CycleTarget(shares(high), step_between(state.groups, masks_at(low), masks_at(high), model))


def cost_limit(plan: Plan, state: CycleState, model: CostModel) -> float:
    """Return the largest cost after a cycle, as a fraction of the dense model's.

    Args:
        plan: The pruning plan.
        state: State before the cycle.
        model: The cost model of `state`.
    """
    assert state.costs.final is not None
    return plan.cost_limits(state.costs.final, model.start)[state.number - 1]


def _relative_latency(times: Latencies, model: CostModel) -> float:
    """Return a latency as a fraction: of the first measurement of the dense model, or of the one next to it."""
    return times["median"] / (model.dense if model.cost == "latency_ms" else times["dense"])


def _feasible_blocks(
    target: Mapping[str, float], groups: Sequence[Group], constraints: Constraints
) -> Mapping[str, float]:
    """Move the sparsity of blocks into their constraints; `select` does it for units."""
    result = dict(target)
    for group in groups:
        if group.kind == "block" and group.name in constraints and "block" in target:
            blocks = group.units // 2
            wanted = blocks - blocks_removed(target["block"], blocks)
            result["block"] = 1 - nearest(constraints[group.name].kept(blocks, blocks, 1), wanted) / blocks
    return result


def costs_for(dense: nn.Module, groups: Sequence[Group], plan: Plan) -> Costs:
    """Return the cost models of a plan for a dense model.

    Raises:
        BadInput: the target is out of the model's reach, or a rule or an N:M pattern does not fit it.
    """
    state = CycleState(plan.config.cycles, all_units(groups), groups, Costs())
    constraints = constraints_for(plan, state)
    _check_runs(dense, groups, plan, constraints)
    macs_kinds = [group for group in groups if group.kind in plan.macs_kinds]
    path = None if plan.config.target is None else plan.config.target.table
    table = None if path is None else read_latency_table(path)
    if macs_kinds and table is not None:
        state = replace(state, costs=Costs(times=table.all_times(macs_kinds)))
    elif macs_kinds:
        per_unit = macs_per_unit(macs_kinds, make_cost_model(dense, macs_kinds, "macs"))
        state = replace(state, costs=Costs(macs_per_unit=per_unit))
    if plan.target is None:
        return state.costs
    model = make_cost_model(dense, groups, next(iter(plan.target)), table)
    equal = {group.name: torch.zeros(group.shape) for group in groups}
    most = _feasible_blocks(plan.shares(math.nextafter(1.0, 0.0)), groups, constraints)
    final = fraction_of(plan.target, model, model(select_masks(equal, plan, most, state)))
    plan.cost_limits(final)  # checks the schedule
    if without_merging(dense) is not dense and model.start <= final:
        raise BadInput(
            f"prune.merge_tokens: merged tokens reduce {model.cost} to {model.start:.4f} of the dense model without "
            f"pruning, and prune.target.{model.cost} is {final:.4f}; lower one of them, or give a sparsity"
        )
    return replace(state.costs, model=model, final=final)


def _check_runs(dense: nn.Module, groups: Sequence[Group], plan: Plan, constraints: Constraints) -> None:
    """Refuse a layer whose weights cannot be divided into the runs of an N:M pattern, unless a rule ignores it."""
    pattern = plan.context(0).pattern
    if pattern is None or not plan.method.needs_runs_in_memory:
        return
    for group in groups:
        is_ignored = constraints.get(group.name, UNCONSTRAINED).max_sparsity == 0
        if not is_ignored and (why := pattern_refusal(dense, group, pattern[1])):
            raise BadInput(why)


def reached_cost(selected: CycleMasks, plan: Plan, state: CycleState) -> CostReport:
    """Return target and reached cost of a cycle in the unit of the target; empty without a cost target.

    An absolute target comes with the dense model's cost, latencies with their 10th and 90th percentile in ms. If the
    cost misses the target by more than 2 %, `why` gives the reason.
    """
    model = state.costs.model
    if model is None or plan.target is None:
        return {}
    limit = cost_limit(plan, state, model)
    times = model.latencies(selected.masks) if model.latencies is not None else {}
    reached = _relative_latency(times, model) if times else model(selected.masks)
    report: dict[str, float | str] = {"target": limit, "reached": reached}
    if not is_fraction(plan.target):
        digits = None if model.cost in COUNTS else 6
        target, absolute = round(limit * model.dense, digits), round(reached * model.dense, digits)
        report = {"target": target, "reached": absolute, "dense": model.dense}
    report |= {name: times[name] for name in ("p10", "p90") if name in times}
    last_step = selected.last_step
    if times:
        drift = f"the dense model now takes {times['dense']:.4g} ms, and took {model.dense:.4g} ms at the start"
        last_step = f"{drift}; {last_step}" if last_step else drift
    why = explain_miss(limit, reached, model, last_step)
    return {model.cost: report | ({"why": why} if why else {})}


def _rescore(
    model: nn.Module, batches: Batches, scores: Scores, plan: Plan, target: Mapping[str, float], state: CycleState
) -> Rescored:
    """Rescore the units near the pruning threshold, if the method does so."""
    if plan.method.rescore is None:
        return Rescored(scores, {})
    constraints = constraints_for(plan, state)
    pools: list[CandidatePool] = []
    for kind, share in target.items():
        same = [group for group in state.groups if group.kind == kind]
        masks = {group.name: state.masks[group.name] for group in same}
        pools += candidate_pools(masks, share, plan.scope_of(kind), same, state.masks, 1, constraints)
    index = {name: mask.flatten().cumsum(0) - 1 for name, mask in state.masks.items()}  # of a remaining unit in `model`
    now = [CandidatePool(tuple((name, index[name][units]) for name, units in p.members), p.remove) for p in pools]
    if not any(pool.remove for pool in now):
        return Rescored(scores, {})
    groups = [group for group in groups_for(model, plan) if group.kind in target]
    by_name = {group.name: scores[group.name] for group in groups}
    return plan.method.rescore(model, groups, batches, by_name, now, plan.context(state.number))
