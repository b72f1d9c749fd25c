"""Score and prune a model in one call."""

import copy
import re
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vitprune.architectures import find_groups
from vitprune.architectures.narrow_attention import call_output_projections, restore_classes
from vitprune.architectures.traced_groups import left_out
from vitprune.architectures.unstructured import dense_projections
from vitprune.config.allocation_config import AllocationConfig
from vitprune.config.prune_config import Kind, PruneConfig
from vitprune.config.quantity import Quantity, format_cost, seconds_of
from vitprune.config.reconstruct_config import ReconstructConfig
from vitprune.config.score_config import ScoreConfig
from vitprune.config.section import check_seed
from vitprune.config.targets import Rule, Target
from vitprune.criteria import DEFAULT_SCORE_CONFIG, Batches, Criterion, Importance, ScoringContext
from vitprune.data import example_input as example_of
from vitprune.data.batch_checks import checked_batches, checked_input
from vitprune.data.class_subset import images_of_classes
from vitprune.errors import BadInput, Unreachable
from vitprune.evaluation.cost import Counts, count
from vitprune.groups import Group, Masks, Scores, check_groups, is_within
from vitprune.pruning.auto import auto_method, has_exact_scores
from vitprune.pruning.cycle_masks import all_groups, available_kinds, refuse_equal_scores, sparsity_per_kind
from vitprune.pruning.low_rank_updates import low_rank_updates
from vitprune.pruning.methods import CRITERIA, METHODS, Method, method_named, records_layers
from vitprune.pruning.plan import Plan, plan_for
from vitprune.pruning.preparation import prepared
from vitprune.pruning.prune_cycles import Cycle, prune_cycles
from vitprune.pruning.unusable_groups import unusable_groups
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import eval_mode, scoring_mode
from vitprune.runtime.input_size import set_input_size
from vitprune.runtime.model_checks import checked_model, float_type
from vitprune.runtime.outputs import return_logits, return_output
from vitprune.runtime.wrappers import is_timm_model, plain_model

AUTO_BUDGET, SHOWN = "3min", 3
NOTHING_SKIPPED: Mapping[str, str] = {}


@dataclass(frozen=True)
class PruneResult:
    """Result of `prune`; `print(result)` shows a table of the cost before and after.

    Attributes:
        model: The pruned model.
        masks: Mask of every group of the dense model; True for remaining units.
        sparsity: Fraction of the units removed, per kind.
        before: Cost of the dense model.
        after: Cost of the pruned model.
        target_miss: If the cost misses the target by more than 2 %, the reason; else empty.
        skipped: Kinds of the method that this model does not have, and modules that cannot be pruned, each with the
            reason.
        seconds: Duration in seconds.
        reconstruction: KL divergence from the dense logits on held-out images before and after the last
            reconstruction, in nats per image, the pass that was kept and the number of passes; empty without.
        allocation: The same divergence for the widths of the ranking and for those of the search, and the number of
            evaluated models; empty without a search.
        chosen_method: Name of the method that "auto" stands for; empty if a method was given.
        correction: The same divergence before and after the correction of norms; equal if no step reduced it, and the
            norms were not changed; empty without.
    """

    model: nn.Module
    masks: Masks
    sparsity: Mapping[str, float]
    before: Counts
    after: Counts
    target_miss: str
    skipped: Mapping[str, str]
    seconds: float
    reconstruction: Mapping[str, float] = field(default_factory=dict)
    allocation: Mapping[str, float] = field(default_factory=dict)
    chosen_method: str = ""
    correction: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        names = {"params": "parameters", "nonzero_params": "nonzero parameters", "macs": "MACs"}
        names |= {"nonzero_macs": "nonzero MACs"}
        lines = [f"{'':<20}{'before':>10}{'after':>10}{'change':>10}"]
        for name, label in names.items():
            before, after = getattr(self.before, name), getattr(self.after, name)
            change = f"{after / before - 1:+.1%}" if before else ""
            lines.append(f"{label:<20}{format_cost(before):>10}{format_cost(after):>10}{change:>10}")
        lines.append("sparsity: " + ", ".join(f"{kind} {share:.3g}" for kind, share in self.sparsity.items()))
        lines += [f"left out: {name} ({why.removeprefix(f'{name}: ')})" for name, why in self.skipped.items()]
        lines += [f"target: {self.target_miss}"] if self.target_miss else []
        lines += [f"method: {self.chosen_method}"] if self.chosen_method else []
        steps = {"allocation": self.allocation, "reconstruction": self.reconstruction, "correction": self.correction}
        for step, facts in steps.items():
            if facts:
                nats = [f"{facts[key]:.3g}" for key in ("nats_before", "nats_after")]
                passes = f", pass {facts['pass']:.0f} of {facts['passes']:.0f}" if "passes" in facts else ""
                lines.append(f"{step}: held-out KL divergence {nats[0]} -> {nats[1]} nats per image{passes}")
        return "\n".join([*lines, f"{self.seconds:.1f} s"])


@check_arguments()
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
        model: A timm model, or a vision model of another library or of your own.
        groups: Groups of units, from `find_groups`.
        criterion: Name of a criterion in `CRITERIA`, or a function.
        batches: Calibration batches (images (B, C, H, W), labels (B,)), for criteria that need data; all are read into
            memory.
        seed: Seed of random numbers.
        config: Options of the criterion.

    Returns:
        Scores by group name, each of the group's shape; larger = more important.

    Raises:
        BadInput: there is no such criterion, it needs batches, it does not score every unit, there are no groups, or
            the model or a batch cannot be used.
    """
    if isinstance(criterion, str) and criterion not in CRITERIA:
        why = "is a method, not a criterion" if criterion in METHODS else "unknown"
        raise BadInput(f"criterion {criterion!r}: {why}; use one of {', '.join(CRITERIA)}")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    check_seed(seed)
    if not groups:
        raise BadInput("groups: is empty; give groups of find_groups")
    work = working_copy(model)
    if records_layers(function):
        call_output_projections(work)
    check_groups(work, groups)
    with scoring_mode(work):
        given = checked_batches(batches, work)
        importance = function(work, groups, given, ScoringContext(config, seed))
        if not isinstance(importance, Importance):
            raise BadInput(f"criterion: returned a {type(importance).__name__}; it must return an Importance")
        scores = importance.scores
    _check_scores(scores, groups)
    if given:  # without images, weights that are zero are all alike
        refuse_equal_scores(scores, groups)
    return scores


def _check_scores(scores: Scores, groups: Sequence[Group]) -> None:
    for group in groups:
        found = scores.get(group.name)
        if not isinstance(found, Tensor) or found.numel() != group.units:
            what = f"scores {list(found.shape)}" if isinstance(found, Tensor) else "no scores"
            raise BadInput(f"criterion: returned {what} for {group.name}; it must return {list(group.shape)}")


@check_arguments(but=PruneConfig.model_fields.keys() - {"kinds", "rules", "classes", "reconstruct", "allocation"})
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
    cycles: int = 1,
    merge_heads_to: int | None = None,
    rotate_residual: bool = False,
    merge_tokens: int | None = None,
    classes: Sequence[int] | None = None,
    correct_norms: bool = False,
    reconstruct: ReconstructConfig | bool = False,
    allocation: AllocationConfig | bool = False,
    budget: Quantity | None = None,
    example_input: Tensor | None = None,
    within: str | None = None,
    seed: int = 0,
) -> PruneResult:
    """Prune a copy of a model; the model itself is not changed.

    Give exactly one of `sparsity` and `target`; N:M methods need neither. A model in half precision is pruned in
    float32, and the result has the model's own type. The result has no wrapper of torch.compile or data parallelism.

    Args:
        model: A timm model, or a vision model of another library or of your own. If its output has several tensors,
            `logits` is compared, else `out`, else `last_hidden_state`, else the first tensor.
        method: Name of a method in `METHODS`, or "auto": the method that loses the least accuracy without training, for
            the given kinds or target (with one sparsity or an N:M scope: single weights), with `reconstruct` and a
            `budget` of three minutes.
        sparsity: Fraction of units to remove, one for all kinds or one per kind (scope macs: fraction of their MACs).
        target: Cost of the pruned model, such as {"macs": 0.5}, {"params": "12M"} or {"latency_ms": 20}.
        kinds: Kinds to prune; None: all default kinds of the method that the model has, with whole heads in place of
            attention channels that cannot be pruned, see `PruneResult.skipped`.
        calibration: Batches (images (B, C, H, W), labels (B,)), or batches of images for methods without labels; all
            are read into memory.
        config: Options of the criteria.
        scope: Units that are ranked together, such as "layer", "global", "macs" or "2:4"; None: as the method defines
            it.
        round_to: Remaining units of every group are a multiple of this.
        rules: Constraints on single groups, such as {"match": "blocks.0.mlp", "ignore": True}.
        cycles: Number of pruning cycles. With several, the sparsity or cost approaches its goal on a cubic schedule,
            every cycle computes new scores, and `reconstruct` and `correct_norms` follow each.
        merge_heads_to: Merge the attention heads into this many first.
        rotate_residual: Rotate the residual stream of a plain ViT first, so that its last channels matter least.
        merge_tokens: Merge this many tokens of a plain ViT before every block but the first, see
            `PruneConfig.merge_tokens`.
        classes: Classes of the model that are needed, such as [0, 217, 482]: scores, updates and reconstruction use
            their logits alone, calibration images with labels of other classes are left out, and the pruned model has
            one output per class, in this order. Costs and targets refer to the dense model with these outputs.
        correct_norms: Correct norms and biases towards the dense model's logits.
        reconstruct: Fit the remaining weights to the dense model without labels; True: with the default settings.
        allocation: Search the sparsity of every group on held-out images; True: with the default settings.
        budget: Time for the whole call, such as "3min" or seconds: the reconstruction makes as many passes as are
            expected to fit, instead of `ReconstructConfig.passes`. Scoring alone may take longer.
        example_input: Input (B, C, H, W) for a check of the result and for the counts; None: an input of the model's
            size, without the check. Models that are not timm's are traced at its size, or at that of the calibration
            images.
        within: Path of a module, such as "backbone": only groups inside it are pruned, while scores and outputs are
            those of the whole model.
        seed: Seed of random numbers.

    Returns:
        The pruned model, its masks and its cost.

    Raises:
        BadInput: a setting, a module or the result cannot be used; the message names it.

    Example:
        result = vitprune.prune(model, "auto", target={"macs": 0.5}, calibration=batches, budget="5min")
    """
    start = time.perf_counter()
    chosen = ""
    if method == "auto":
        given = kinds or (sparsity if isinstance(sparsity, Mapping) else ())
        exact = has_exact_scores(plain_model(model))
        method = chosen = auto_method(given, target is not None, rotate_residual, exact)
        reconstruct, budget = reconstruct or True, AUTO_BUDGET if budget is None else budget
    deadline = _deadline(start, budget, reconstruct)
    settings: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "target": target,
        "kinds": kinds,
        "scope": scope,
        "round_to": round_to,
        "rules": rules,
        "cycles": cycles,
        "merge_heads_to": merge_heads_to,
        "rotate_residual": rotate_residual,
        "merge_tokens": merge_tokens,
        "classes": None if classes is None else list(classes),
        "correct_norms": correct_norms,
        "reconstruct": ReconstructConfig() if reconstruct is True else reconstruct or None,
        "allocation": AllocationConfig() if allocation is True else allocation or None,
    }
    used = method_named(method)
    pruned = working_copy(model)
    if used.records_layers:
        call_output_projections(pruned)
    if example_input is not None:
        example_input = checked_input("example_input", example_input, pruned)
    batches: Batches = checked_batches(calibration, pruned)
    set_input_size(pruned, example_input if example_input is not None or not batches else batches[0][0])
    if within is not None:
        settings["rules"] = [*rules, *_outside(pruned, within, kinds or used.kinds, used)]
    plan, skipped = fitting_plan(pruned, PruneConfig(**settings), config, seed)
    if batches:
        plan, unusable = usable_plan(pruned, plan, batches[0][0])
        skipped |= unusable
    if isinstance(model, FeatureGetterNet) and "residual" in plan.sparsity:
        raise BadInput("FeatureGetterNet: residual channels are its output; prune other kinds")
    batches = images_of_classes(batches, plan.config.classes)
    pruned = prepared(pruned, plan, batches)
    cycle = _run_cycles(pruned, plan, batches, deadline, skipped)
    if example_input is not None:
        with scoring_mode(pruned):
            _check_finite(pruned, example_input)
    pruned = pruned.to(float_type(plain_model(model)))
    return result_of(model, pruned, cycle, start, skipped, example_input, chosen)


def _run_cycles(
    model: nn.Module, plan: Plan, batches: Batches, deadline: float | None, skipped: Mapping[str, str]
) -> Cycle:
    """Prune a model in place, return the last cycle; an error of an unreachable target names what is not pruned."""
    with scoring_mode(model):
        try:
            *_, cycle = prune_cycles(model, plan, batches, deadline=deadline)
        except Unreachable as error:
            raise Unreachable("; ".join([str(error), *_not_pruned(skipped)])) from None
    return cycle


def fitting_plan(
    model: nn.Module, config: PruneConfig, score_config: ScoreConfig, seed: int
) -> tuple[Plan, dict[str, str]]:
    """Return the plan for the kinds that a model has, and what is left out.

    Args:
        model: The dense model.
        config: The settings. Without kinds and sparsities per kind: the default kinds of the method.
        score_config: Options of the criteria.
        seed: Seed of the run.

    Returns:
        The plan, and the reason by name of a kind or module that is left out.

    Raises:
        BadInput: the model has none of the default kinds, or as `plan_for`.
    """
    method, skipped = method_named(config.method), dict[str, str]()
    if config.kinds is None and not isinstance(config.sparsity, Mapping):
        available, skipped = available_kinds(model, method.kinds, method)
        if not available:
            raise BadInput(next(iter(skipped.values())))
        config = config.model_copy(update={"kinds": available if skipped else None})
    plan = plan_for(config, score_config, seed)
    skipped |= {name: why for kind in plan.sparsity for name, why in left_out(model, kind).items()}
    skipped |= low_rank_updates(model) if "ffn" in plan.sparsity else {}
    return plan, skipped | (dense_projections(model) if "weight" in plan.sparsity else {})


def _not_pruned(skipped: Mapping[str, str]) -> list[str]:
    reasons = [f"not pruned: {name}: {why.removeprefix(f'{name}: ')}" for name, why in skipped.items()]
    return [*reasons[:SHOWN], *([f"and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else [])]


def usable_plan(model: nn.Module, plan: Plan, images: Tensor) -> tuple[Plan, dict[str, str]]:
    """Return a plan without the groups that its method cannot score, and these with the reason.

    Args:
        model: The dense model.
        plan: The plan.
        images: Calibration images (B, C, H, W).

    Raises:
        BadInput: no group is left, or as `unusable_groups`.
    """
    groups = all_groups(model, plan, list(plan.sparsity))
    reasons = unusable_groups(model, groups, images, plan.method)
    if groups and len(reasons) == len(groups):
        raise BadInput(next(iter(reasons.values())))
    names = [group.name for group in groups]
    rules = tuple(rule for rule in plan.config.rules if not _is_needless(rule, names, reasons))
    config = plan.config.model_copy(update={"rules": rules})
    return replace(plan, config=config, left_out=frozenset(reasons)), reasons


def _is_needless(rule: Rule, names: Sequence[str], left_out: Container[str]) -> bool:
    """Whether a rule applies only to groups that are left out."""
    matching = [name for name in names if re.fullmatch(rule.match, name)]
    return bool(matching) and all(name in left_out for name in matching)


def _outside(model: nn.Module, within: str, kinds: Sequence[str], method: Method) -> list[dict[str, object]]:
    """Return the rule that ignores all groups outside a module; none if there is no group outside."""
    if within not in dict(model.named_modules()) or not within:
        raise BadInput(f"within {within!r}: the model has no module of this name; give a path of named_modules")
    groups = [group for kind in available_kinds(model, kinds, method)[0] for group in find_groups(model, [kind])]
    inside = [group for group in groups if is_within(group.name, [within])]
    if groups and not inside:
        raise BadInput(f"within {within!r}: has no groups of kind {', '.join(kinds)}; vitprune check lists the groups")
    rule: dict[str, object] = {"match": rf"(?!{re.escape(within)}(\.|$)).*", "ignore": True}
    return [rule] if len(inside) < len(groups) else []


def _deadline(start: float, budget: Quantity | None, reconstruct: ReconstructConfig | bool) -> float | None:
    if budget is None:
        return None
    if not reconstruct:
        raise BadInput("budget: is for the reconstruction; give reconstruct=True")
    try:
        return start + seconds_of(budget)
    except ValueError as error:
        raise BadInput(f"budget: {error}") from None


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its wrappers; a model in half precision is converted to float32.

    Raises:
        BadInput: the model cannot be scored, pruned or saved, see `checked_model`.
    """
    plain = checked_model(model)
    with torch.inference_mode(False):
        work = copy.deepcopy(plain)
    if not is_timm_model(work):
        return_logits(work)
    return work.float() if float_type(plain).itemsize < torch.float32.itemsize else work


def result_of(
    dense: nn.Module,
    pruned: nn.Module,
    cycle: Cycle,
    start: float,
    skipped: Mapping[str, str] = NOTHING_SKIPPED,
    example_input: Tensor | None = None,
    chosen_method: str = "",
) -> PruneResult:
    """Return the result of a run after its last cycle.

    Args:
        dense: The user's model.
        pruned: The pruned model.
        cycle: The last cycle.
        start: Time of `time.perf_counter` at which the run started.
        skipped: What is not pruned, with the reason.
        example_input: Input for the counts; None: one of the model's size.
        chosen_method: Method that "auto" stands for; empty if a method was given.
    """
    plain = plain_model(dense)
    where = "example_input: is not given, and at the default size" if example_input is None else "example_input"
    example = checked_input(where, example_of(pruned, 1) if example_input is None else example_input, plain)
    before = count(plain, example)
    return_output(pruned)
    restore_classes(pruned)
    return PruneResult(
        # a feature extractor, if the dense model is one
        model=copy.deepcopy(dense, {id(dense.model): pruned}) if isinstance(dense, FeatureGetterNet) else pruned,
        masks=cycle.masks,
        sparsity=sparsity_per_kind(cycle.groups, cycle.masks),
        before=before,
        after=count(pruned, example),
        target_miss="".join(str(report.get("why", "")) for report in cycle.cost.values()),
        skipped=skipped,
        seconds=time.perf_counter() - start,
        reconstruction=cycle.reconstruction.facts,
        allocation=cycle.allocation,
        chosen_method=chosen_method,
        correction=cycle.corrected,
    )


def _check_finite(model: nn.Module, example_input: Tensor) -> None:
    with torch.no_grad(), eval_mode(model):
        output = model(example_input)
    for part in output if isinstance(output, list | tuple) else [output]:
        if not bool(part.isfinite().all()):
            raise BadInput(f"{type(model).__name__}: the pruned model's output is not finite; check the dense model's")
