"""Pruning plan: the settings, checked against the pruning method and resolved to a sparsity per kind."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitprune.config.params import Params
from vitprune.config.prune_config import HEAD_CHANNELS, PruneConfig
from vitprune.config.score_config import ScoreConfig
from vitprune.config.section import check_seed
from vitprune.criteria import DEFAULT_SCORE_CONFIG, ScoringContext
from vitprune.errors import BadInput
from vitprune.evaluation.latency_table import ADDITIVE
from vitprune.pruning.constraints import WIDTHS
from vitprune.pruning.cost_target import is_fraction, relative_shares
from vitprune.pruning.methods import Method, method_named
from vitprune.pruning.schedule import epochs_per_cycle, sparsities
from vitprune.pruning.select import SCOPES, pattern_of, sparsity_of
from vitprune.runtime.arguments import check_arguments


@dataclass(frozen=True)
class Plan:
    """Checked settings of a pruning run.

    Attributes:
        config: The settings.
        method: The pruning method.
        sparsity: Final sparsity per kind. With a target, the shares of the kinds relative to each other, the largest
            being 1: all are multiplied by the one scalar that reaches the cost.
        target: The one cost and its limit, a fraction of the dense model's cost or an absolute number; None without.
        round_to: Multiple of the remaining units, per kind.
        score: Options of the criteria.
        seed: Seed of the run.
        left_out: Names of groups that are not pruned.
    """

    config: PruneConfig
    method: Method
    sparsity: Mapping[str, float]
    target: Mapping[str, float] | None
    round_to: Mapping[str, int]
    score: ScoreConfig = DEFAULT_SCORE_CONFIG
    seed: int = 0
    left_out: frozenset[str] = frozenset()

    def context(self, cycle: int) -> ScoringContext:
        """Return the scoring context of a cycle; every cycle has its own seed."""
        pattern = pattern_of(self.scope_of("weight")) if "weight" in self.sparsity else None
        return ScoringContext(self.score, self.seed + cycle, pattern=pattern)

    def scope_of(self, kind: str) -> str:
        """Return the scope of a kind. Attention channels are ranked within their head, unless the scope is macs."""
        if self.config.scope in (None, "macs"):
            return self.config.scope or self.method.scopes[kind]
        return "head" if kind in HEAD_CHANNELS else str(self.config.scope)

    @property
    def macs_kinds(self) -> list[str]:
        """Kinds whose units are ranked together, by score per MAC saved."""
        return [kind for kind in self.sparsity if self.scope_of(kind) == "macs"]

    def shares(self, scalar: float) -> dict[str, float]:
        """Return the sparsity per kind for a scalar, if a cost target determines the amount."""
        return {kind: share * scalar for kind, share in self.sparsity.items()}

    def cost_limits(self, final: float, start: float = 1.0) -> list[float]:
        """Return the limit of the target's cost after each cycle, as a fraction of the dense model's cost.

        Args:
            final: The limit after the last cycle.
            start: The cost before the first cycle; less than 1 if tokens are merged.
        """
        scale = (start - final) / (1 - final)
        return [*(start - scale * x for x in self._sparsities(1 - final)[:-1]), final]

    def progress(self, cycle: int, final: float | None) -> float:
        """Return the fraction of all removals that is done after a cycle; 1 after the last.

        Args:
            cycle: The cycle, from 1.
            final: The cost limit after the last cycle; None without a target.
        """
        removed = max(self.sparsity.values()) if final is None else 1 - final
        return self._sparsities(removed)[cycle - 1] / removed if cycle < self.config.cycles and removed else 1.0

    def targets(self) -> list[dict[str, float]]:
        """Return the sparsity per kind after each cycle."""
        by_kind = {kind: self._sparsities(final) for kind, final in self.sparsity.items()}
        return [{kind: steps[cycle] for kind, steps in by_kind.items()} for cycle in range(self.config.cycles)]

    def epochs(self, last: int) -> list[int]:
        """Return the epochs of training after each cycle, as the schedule says; `last` after the last one."""
        steps = None if isinstance(self.config.schedule, str) else self.config.schedule.steps
        return epochs_per_cycle(steps if isinstance(steps, dict) else None, self.config.cycles, last)

    def _sparsities(self, final: float) -> list[float]:
        schedule, cycles = self.config.schedule, self.config.cycles
        if isinstance(schedule, str):
            return sparsities(final, cycles, schedule)
        steps = list(schedule.steps.values()) if isinstance(schedule.steps, dict) else schedule.steps
        return sparsities(final, cycles, schedule.shape or "cubic", schedule.initial, steps)


@check_arguments()
def plan_for(config: PruneConfig, score: ScoreConfig = DEFAULT_SCORE_CONFIG, seed: int = 0) -> Plan:
    """Check settings against the pruning method.

    Args:
        config: The settings. A single sparsity applies to `kinds`, by default those of the method.
        score: Options of the criteria.
        seed: Seed of the run.

    Returns:
        The method, the settings and the final sparsity of every kind.

    Raises:
        BadInput: unknown method, scope or kind, a sparsity or target that the method cannot have, or settings that
            contradict each other.
    """
    check_seed(seed)
    method = method_named(config.method, "prune.method")
    kinds, implied = config.kinds or method.kinds, _implied_sparsity(config, method)
    target = config.target.costs if config.target is not None else None
    if target is not None:
        _check_target(config, kinds, implied)
        sparsity = relative_shares(_per_kind(config, kinds, 1.0))
    elif config.sparsity is None and implied is None:
        raise BadInput(f"prune.sparsity: method {config.method} needs one; give the fraction to remove, 0 to 1")
    else:
        sparsity = _per_kind(config, kinds, implied)
    plan = Plan(config, method, sparsity, target, _widths(config, list(sparsity)), score, seed)
    _check_kinds(plan)
    _check_pattern(plan, implied)
    _check_schedule(plan)
    _check_allocation(plan)
    return plan


def plan_of(params: Params) -> Plan:
    """Return the plan of a params.yaml.

    Raises:
        BadInput: as `plan_for`, or a kind is to be pruned that is not scored.
    """
    plan = plan_for(params.prune, params.score, params.seed)
    scored = scored_kinds(plan)
    for kind in plan.sparsity:
        if kind not in scored:
            raise BadInput(f"prune.sparsity.{kind}: only {', '.join(scored)} are scored; add it to prune.kinds")
    return plan


def scored_kinds(plan: Plan) -> Sequence[str]:
    """Return the kinds that the pipeline scores: those of params.yaml, or those of the method."""
    return plan.config.kinds or plan.method.kinds


def _per_kind(config: PruneConfig, kinds: Sequence[str], default: float | None) -> dict[str, float]:
    if isinstance(config.sparsity, dict):
        return {str(kind): share for kind, share in config.sparsity.items()}
    return dict.fromkeys(kinds, float((default if config.sparsity is None else config.sparsity) or 0))


def _implied_sparsity(config: PruneConfig, method: Method) -> float | None:
    """Check the scope; return the sparsity of an N:M scope, None for other scopes."""
    scope = config.scope
    if scope and not method.free_scope:
        raise BadInput(f"prune.scope {scope!r}: the scope of method {config.method} is fixed; set it to null")
    implied = sparsity_of(scope or method.scopes[method.kinds[0]])
    if scope and implied is None and scope not in (*SCOPES, "macs"):
        raise BadInput(f"prune.scope {scope!r}: unknown; use one of {', '.join(SCOPES)} (as in 2:4), macs")
    if implied is not None and "weight" not in method.scopes:
        raise BadInput(f"prune.scope {scope!r}: N:M is for single weights, which method {config.method} does not prune")
    return implied


def _check_target(config: PruneConfig, kinds: Sequence[str], implied: float | None) -> None:
    if implied is not None:
        raise BadInput("prune.target: an N:M scope implies the sparsity; set the target to null")
    pruned = list(config.sparsity) if isinstance(config.sparsity, Mapping) else kinds
    cost = next(iter(config.target.costs)) if config.target is not None else ""
    if cost.startswith("latency") and "weight" in pruned:
        raise BadInput(f"prune.target.{cost}: zeroed single weights do not run faster; use params or macs")


def _check_kinds(plan: Plan) -> None:
    config, kinds = plan.config, plan.sparsity
    if not kinds:
        raise BadInput("prune.sparsity: names no kind; give the fraction to remove of at least one")
    for kind in kinds:
        if kind not in plan.method.scopes:
            raise BadInput(f"prune.sparsity.{kind}: method {config.method} prunes only {', '.join(plan.method.scopes)}")
    for first, others in (("attention", ("head", "qk", "vo")), ("head", ("qk", "vo"))):
        both = next((kind for kind in others if {first, kind} <= set(kinds)), None)
        if both is not None:
            raise BadInput(f"prune.sparsity: {both} and {first} prune the same axis; choose one of them")
    if {"block", "branch"} <= set(kinds):
        raise BadInput("prune.sparsity: block and branch remove the same modules; choose one of them")
    if config.merge_heads_to is not None and "attention" not in kinds:
        raise BadInput(f"prune.merge_heads_to {config.merge_heads_to}: needs kind attention; set it to null")
    if config.rotate_residual and "residual" not in kinds:
        raise BadInput("prune.rotate_residual: needs kind residual; set it to false")
    if config.merge_tokens is not None and not plan.method.follows_merging:
        why = f"the exact scores of method {config.method} do not follow merged tokens"
        raise BadInput(f"prune.merge_tokens: {why}; use upvits-fisher or unit-obs, or set it to null")
    if config.merge_tokens is not None and config.target is not None and config.target.table is not None:
        raise BadInput("prune.merge_tokens: the times of prune.target.table are those of all tokens; set one to null")
    if len({plan.sparsity[kind] for kind in plan.macs_kinds}) > 1:
        names = ", ".join(plan.macs_kinds)
        raise BadInput(f"prune.sparsity: {names} share one fraction of the MACs; give all the same")


def _check_pattern(plan: Plan, implied: float | None) -> None:
    if implied is None:
        return
    if plan.config.cycles > 1 or not math.isclose(plan.sparsity["weight"], implied, abs_tol=1e-9):
        raise BadInput(f"prune: an N:M scope removes {implied:g} in one cycle; set sparsity to null and cycles to 1")
    if any(rule.ignore is None for rule in plan.config.rules):
        raise BadInput("prune.rules: an N:M scope removes the same fraction of every layer; rules can only ignore some")


def _check_schedule(plan: Plan) -> None:
    if plan.target is None:
        plan.targets()
    elif is_fraction(plan.target):
        plan.cost_limits(*plan.target.values())
    elif not isinstance(plan.config.schedule, str) and plan.config.schedule.steps is not None:
        raise BadInput("prune.schedule.steps: are fractions but prune.target is absolute; use a fraction, or a shape")
    else:
        plan.cost_limits(0.0)
    plan.epochs(1)


def _check_allocation(plan: Plan) -> None:
    config = plan.config
    if config.allocation is None:
        return
    all_compete = set(plan.macs_kinds) == set(plan.sparsity) <= set(ADDITIVE)
    if not all_compete or plan.method.rescore is not None:
        raise BadInput("prune.allocation: is for units that compete per MAC; use unit-obs, or scope macs")
    if config.target is not None and config.target.is_measured:
        raise BadInput("prune.allocation: a latency target needs prune.target.table (vitprune latency-table)")


def _widths(config: PruneConfig, kinds: Sequence[str]) -> dict[str, int]:
    """Return the multiple of every kind that has one."""
    widths = [kind for kind in kinds if kind in WIDTHS]
    if config.round_to is None:
        return {}
    if isinstance(config.round_to, int):
        if not widths:
            raise BadInput(f"prune.round_to {config.round_to}: of {', '.join(kinds)} none is a width; set it to null")
        return dict.fromkeys(widths, config.round_to)
    for kind in config.round_to:
        if kind not in widths:
            pruned = ", ".join(widths) or "none"
            raise BadInput(f"prune.round_to.{kind}: is not among the widths that are pruned ({pruned})")
    return {str(kind): multiple for kind, multiple in config.round_to.items()}
