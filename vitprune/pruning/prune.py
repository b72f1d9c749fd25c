"""Prune a model: compute scores, select masks, remove units; cycle by cycle for gradual pruning."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vitprune.architectures.tracing.cache import shape_error
from vitprune.config.prune_config import Kind, PruneConfig
from vitprune.config.quantity import Quantity, format_cost
from vitprune.config.score_config import ScoreConfig
from vitprune.config.targets import Rule, Target
from vitprune.criteria import DEFAULT_SCORE_CONFIG, Batches, Criterion, ScoringContext, Statistics, Update
from vitprune.data import example_input as example_of
from vitprune.data.batch_checks import checked_batches, checked_input
from vitprune.errors import BadInput
from vitprune.evaluation.cost import Counts, count
from vitprune.groups import Group, Masks, Scores, check_groups, shrink, zero
from vitprune.pruning.block_steps import to_dense_names
from vitprune.pruning.cycle_masks import (
    CostReport,
    CycleState,
    available_kinds,
    cycle_state,
    given_masks,
    groups_for,
    reached_cost,
    refuse_equal_scores,
    select_cycle_masks,
)
from vitprune.pruning.methods import CRITERIA, method_named
from vitprune.pruning.norm_correction import correct_norms as corrected_norms
from vitprune.pruning.norm_correction import dense_logits
from vitprune.pruning.plan import Plan, plan_for
from vitprune.runtime.eval_mode import eval_mode, scoring_mode
from vitprune.runtime.model_checks import checked_model, float_type
from vitprune.runtime.wrappers import plain_model

NOTHING_SKIPPED: Mapping[str, str] = {}


@dataclass(frozen=True)
class Cycle:
    """A completed pruning cycle; masks and scores are indexed as in the dense model.

    Attributes:
        number: Number of the cycle, from 1.
        target: Sparsity per kind that was asked for.
        groups: Groups of the dense model.
        scores: Scores that selected the masks; empty if the masks were given.
        masks: Cumulative masks.
        cost: Target and reached cost, and why a miss is larger than 2 %; empty without a cost target.
        facts: Figures about rescoring.
        corrected: Figures about the correction of norms, on images that it did not use.
    """

    number: int
    target: Mapping[str, float]
    groups: Sequence[Group]
    scores: Scores
    masks: Masks
    cost: CostReport = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    corrected: Mapping[str, float] = field(default_factory=dict)

    @property
    def zeroed(self) -> list[Group]:
        """Groups of single weights: the removed ones are zeros in the model, to be kept at zero in training."""
        return [group for group in self.groups if group.kind == "weight"]


@dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted run continues.

    Attributes:
        dense: The dense model.
        number: The last completed cycle.
        masks: Its masks.
    """

    dense: nn.Module
    number: int
    masks: Masks


@dataclass(frozen=True)
class PruneResult:
    """Result of `prune`; `print(result)` shows a table of the cost before and after.

    Attributes:
        model: The pruned model.
        masks: Mask of every group of the dense model; True for remaining units.
        sparsity: Fraction of the units removed, per kind.
        before: Cost of the dense model.
        after: Cost of the pruned model.
        target_miss: Why the cost misses the target by more than 2 %; empty if it does not, or without a target.
        skipped: Kinds of the method that this model does not have, each with the reason.
        seconds: Duration.
    """

    model: nn.Module
    masks: Masks
    sparsity: Mapping[str, float]
    before: Counts
    after: Counts
    target_miss: str
    skipped: Mapping[str, str]
    seconds: float

    def __str__(self) -> str:
        names = {"params": "parameters", "nonzero_params": "nonzero parameters", "macs": "MACs"}
        names |= {"nonzero_macs": "nonzero MACs"}
        lines = [f"{'':<20}{'before':>10}{'after':>10}{'change':>10}"]
        for name, label in names.items():
            before, after = getattr(self.before, name), getattr(self.after, name)
            change = f"{after / before - 1:+.1%}" if before else ""
            lines.append(f"{label:<20}{format_cost(before):>10}{format_cost(after):>10}{change:>10}")
        lines.append("sparsity: " + ", ".join(f"{kind} {share:.3g}" for kind, share in self.sparsity.items()))
        lines += [f"left out: {kind} ({why})" for kind, why in self.skipped.items()]
        lines += [f"target: {self.target_miss}"] if self.target_miss else []
        return "\n".join([*lines, f"{self.seconds:.1f} s"])


def score(
    model: nn.Module,
    groups: Sequence[Group],
    criterion: str | Criterion,
    batches: Batches = (),
    seed: int = 0,
    config: ScoreConfig = DEFAULT_SCORE_CONFIG,
) -> Scores:
    """Compute the importance of every unit.

    The scores are computed in float32 or float64, also for a model in half precision.

    Args:
        model: A timm model.
        groups: Groups of units, from `find_groups`.
        criterion: Name of a criterion in `CRITERIA`, or a function.
        batches: Calibration batches (images (B, C, H, W), labels (B,)), for criteria that need data; all are read into
            memory.
        seed: Seed of random numbers.
        config: Options of the criterion.

    Returns:
        Scores by group name, each of the group's shape; larger = more important.

    Raises:
        BadInput: there is no such criterion, it needs batches, or the model or a batch cannot be used.
    """
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise BadInput(f"criterion {criterion!r}: unknown; use one of {', '.join(CRITERIA)}")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    work = working_copy(model)
    check_groups(work, groups)
    with scoring_mode(work):
        given = checked_batches(batches, work)
        scores = function(work, groups, given, ScoringContext(config, seed)).scores
    if given:  # without images, weights that are zero are all alike
        refuse_equal_scores(scores, groups)
    return scores


def prune_cycles(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    first: Masks | None = None,
    statistics: Statistics | None = None,
    resume: ResumePoint | None = None,
) -> Iterator[Cycle]:
    """Prune a model in place, cycle by cycle; the caller may train it between two cycles.

    Args:
        model: The dense model, or the model after the cycle of `resume`.
        plan: The pruning plan.
        batches: Calibration batches.
        first: Masks of the first cycle, if they are known.
        statistics: Statistics of the criterion, for the weight update of a first cycle with known masks.
        resume: Where an interrupted run continues.

    Yields:
        Every cycle after its pruning.
    """
    dense = model if resume is None else resume.dense
    runs = not shape_error(dense)
    state = cycle_state(dense, plan) if resume is None else cycle_state(dense, plan, resume.number + 1, resume.masks)
    logits = dense_logits(dense, batches) if plan.config.correct_norms else []
    given = given_masks(first, plan, state) if first is not None and resume is None else None
    while state.number <= plan.config.cycles:
        complete = False
        while not complete:
            groups = groups_for(model, plan)
            if given is not None:
                selected, given = given, None
                update = _update_for_given(model, groups, batches, plan, state, statistics)
            else:
                importance = plan.method.criterion(model, groups, batches, plan.context(state.number))
                selected = select_cycle_masks(model, importance.scores, plan, state, batches)
                update = importance.update
            _apply(model, groups, selected.masks, state, update)
            state, complete = replace(state, masks=selected.masks), selected.complete
        if runs and (why := shape_error(model)):
            raise BadInput(f"{type(model).__name__}: the pruned model does not run ({why}); prune other kinds")
        corrected = _correct(model, logits, batches, plan, state.number)
        cost = reached_cost(selected, plan, state)
        scores, facts = selected.scores, selected.facts
        yield Cycle(state.number, selected.target, state.groups, scores, state.masks, cost, facts, corrected)
        state = state.following(selected.masks)


def prune(
    model: nn.Module,
    method: str,
    *,
    sparsity: float | Mapping[Kind, float] | None = None,
    target: Target | Mapping[str, Quantity] | None = None,
    kinds: Sequence[Kind] | None = None,
    calibration: Batches = (),
    config: ScoreConfig = DEFAULT_SCORE_CONFIG,
    scope: str | None = None,
    round_to: int | Mapping[Kind, int] | None = None,
    rules: Sequence[Rule | Mapping[str, object]] = (),
    merge_heads_to: int | None = None,
    correct_norms: bool = False,
    example_input: Tensor | None = None,
    seed: int = 0,
) -> PruneResult:
    """Prune a copy of a timm model in one cycle; the model itself is not changed.

    Give exactly one of `sparsity` and `target`; N:M methods need neither. A model in half precision is pruned in
    float32, and the result has the model's own type. The result has no wrapper of torch.compile or data parallelism.

    Args:
        model: A timm model.
        method: Name of a method in `METHODS`.
        sparsity: Fraction of units to remove, one for all kinds or one per kind.
        target: Cost of the pruned model, such as {"macs": 0.5}, {"params": "12M"} or {"latency_ms": 20}.
        kinds: Kinds to prune; None: all kinds of the method that the model has, see `PruneResult.skipped`.
        calibration: Batches (images (B, C, H, W), labels (B,)), for methods that need data; all are read into memory.
        config: Options of the criteria.
        scope: See `PruneConfig.scope`; likewise `round_to`, `rules`, `merge_heads_to` and `correct_norms`.
        round_to: Remaining units of every group are a multiple of this.
        rules: Constraints on single groups, such as {"match": "blocks.0.mlp", "ignore": True}.
        merge_heads_to: Merge the attention heads into this many first.
        correct_norms: Correct norms and biases towards the dense model's logits.
        example_input: Input (B, C, H, W) for a check of the result; None: an input of the model's size, for the counts.
        seed: Seed of random numbers.

    Returns:
        The pruned model, its masks and its cost.

    Raises:
        BadInput: a setting, a module or the result cannot be used; the message names it.

    Example:
        result = vitprune.prune(model, "upvits", target={"macs": 0.5}, calibration=batches)
    """
    start = time.perf_counter()
    skipped: dict[str, str] = {}
    settings: dict[str, Any] = {"method": method, "sparsity": sparsity, "target": target, "kinds": kinds}
    settings |= {"scope": scope, "round_to": round_to, "rules": rules}
    settings |= {"merge_heads_to": merge_heads_to, "correct_norms": correct_norms}
    pruned = working_copy(model)
    if kinds is None and not isinstance(sparsity, Mapping):
        available, skipped = available_kinds(pruned, method_named(method).kinds)
        if not available:
            raise BadInput(next(iter(skipped.values())))
        settings["kinds"] = available if skipped else None
    plan, dense = plan_for(PruneConfig(**settings), config, seed), plain_model(model)
    if isinstance(model, FeatureGetterNet) and "residual" in plan.sparsity:
        raise BadInput("FeatureGetterNet: residual channels are its output; prune other kinds")
    if example_input is not None:
        example_input = checked_input("example_input", example_input, pruned)
    with scoring_mode(pruned):
        (cycle,) = prune_cycles(pruned, plan, checked_batches(calibration, pruned))
        if example_input is not None:
            _check_finite(pruned, example_input)
    return result_of(model, pruned.to(float_type(dense)), cycle, start, skipped, example_input)


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model inside its wrappers, in float32 if it is in half precision.

    Raises:
        BadInput: the model cannot be scored, pruned or saved, see `checked_model`.
    """
    plain = checked_model(model)
    with torch.inference_mode(False):
        work = copy.deepcopy(plain)
    return work.float() if float_type(plain).itemsize < torch.float32.itemsize else work


def result_of(
    dense: nn.Module,
    pruned: nn.Module,
    cycle: Cycle,
    start: float,
    skipped: Mapping[str, str] = NOTHING_SKIPPED,
    example_input: Tensor | None = None,
) -> PruneResult:
    """Return the result after the last cycle of a run that started at a time of `time.perf_counter`."""
    plain = plain_model(dense)
    where = "example_input: is not given, and at the default size" if example_input is None else "example_input"
    example = checked_input(where, example_of(plain, 1) if example_input is None else example_input, plain)
    return PruneResult(
        model=_rewrapped(dense, pruned),
        masks=cycle.masks,
        sparsity=_sparsity_per_kind(cycle),
        before=count(plain, example),
        after=count(pruned, example),
        target_miss="".join(str(report.get("why", "")) for report in cycle.cost.values()),
        skipped=skipped,
        seconds=time.perf_counter() - start,
    )


def _rewrapped(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """Return the pruned model, as a feature extractor if the dense one is."""
    return copy.deepcopy(model, {id(model.model): pruned}) if isinstance(model, FeatureGetterNet) else pruned


def _sparsity_per_kind(cycle: Cycle) -> dict[str, float]:
    result = {}
    for kind in dict.fromkeys(group.kind for group in cycle.groups):
        masks = torch.cat([cycle.masks[group.name].flatten() for group in cycle.groups if group.kind == kind])
        result[kind] = int((~masks).sum()) / masks.numel()
    return result


def _check_finite(model: nn.Module, example_input: Tensor) -> None:
    with torch.no_grad(), eval_mode(model):
        output = model(example_input)
    for part in output if isinstance(output, list | tuple) else [output]:
        if not bool(part.isfinite().all()):
            raise BadInput(f"{type(model).__name__}: the pruned model's output is not finite; check the dense model's")


def _update_for_given(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    plan: Plan,
    state: CycleState,
    statistics: Statistics | None,
) -> Update | None:
    """Return the weight update of a cycle whose masks are given, from the statistics of its scoring if possible."""
    method, context = plan.method, plan.context(state.number)
    if method.recompute_update is not None:
        return method.recompute_update(model, groups, batches, context)
    if method.update_from_stats is None:
        return None
    if statistics:
        return method.update_from_stats(model, groups, statistics)
    return method.criterion(model, groups, batches, context).update


def _correct(
    model: nn.Module, logits: Sequence[Tensor], batches: Batches, plan: Plan, number: int
) -> Mapping[str, float]:
    """Correct norms and biases towards the dense model's logits, if the plan says so; return figures about it."""
    if not plan.config.correct_norms:
        return {}
    corrected = corrected_norms(model, logits, batches, plan.context(number))
    _copy_params(model, corrected.values)
    return corrected.facts


@torch.no_grad()
def _copy_params(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


@torch.no_grad()
def _apply(model: nn.Module, groups: Sequence[Group], masks: Masks, state: CycleState, update: Update | None) -> None:
    """Update the remaining weights, then zero single weights and cut out the other units."""
    names = to_dense_names(state.groups, groups, state.masks)
    weights = [group for group in groups if group.kind == "weight"]
    units = [group for group in groups if group.kind != "weight"]
    own_masks = {
        group.name: masks[names[group.name]].flatten()[state.masks[names[group.name]].flatten()].view(group.shape)
        for group in units
    }
    if update is not None:
        _copy_params(model, update(own_masks | {group.name: masks[group.name] for group in weights}))
    zero(model, weights, masks)
    shrink(model, units, own_masks)
