"""What is to be done to a model: a method and how much of each kind goes, checked against the method's row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vitprune.config.params import Params, Schedule
from vitprune.config.quantity import Quantity, parse_cost
from vitprune.config.targets import Rule, rule_of
from vitprune.criteria import DEFAULT_SCORE_CONFIG, ScoreConfig
from vitprune.errors import BadInput
from vitprune.pruning.cost_target import check, is_fraction, relative
from vitprune.pruning.methods import Method, method_named
from vitprune.pruning.rules import WIDTHS
from vitprune.pruning.schedule import spans, sparsities
from vitprune.pruning.select import SCOPES, pattern_of, sparsity_of

Target = Mapping[Any, Quantity]  # one cost: a fraction of the dense model's or an absolute number
Rules = Sequence[Rule | Mapping[str, Any]]
Widths = int | Mapping[Any, int]  # one multiple for all kinds that are widths, or one per kind
Sparsity = float | Mapping[Any, float]  # one for all kinds, or one per kind


@dataclass(frozen=True)
class Plan:
    """What to do to a model: method, final sparsity per kind, and the schedule that leads there.

    With a `target`, a cost and how much of it may be left, the sparsities are only relative to each other: the largest
    is 1, and all are multiplied by the one scalar that reaches the cost. `round_to` has a multiple per kind.
    """

    method: str
    sparsity: Mapping[str, float]
    scope: str | None = None
    merge_heads_to: int | None = None
    cycles: int = 1
    schedule: str | Schedule = "cubic"
    setting: ScoreConfig = DEFAULT_SCORE_CONFIG
    target: Mapping[str, Quantity] | None = None
    correct_norms: bool = False
    round_to: Mapping[str, int] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    @property
    def row(self) -> Method:
        """The method's row in the table."""
        return method_named(self.method)

    def setting_of(self, cycle: int) -> ScoreConfig:
        """How the cycle of that number scores: every one has a seed of its own, and N:M is known beforehand."""
        pattern = pattern_of(self.scope_of("weight")) if "weight" in self.sparsity else None
        return replace(self.setting, seed=self.setting.seed + cycle, pattern=pattern)

    def scope_of(self, kind: str) -> str:
        """Who competes among the units of a kind; attention channels inside their head, or all for the MACs."""
        if self.scope in (None, "macs"):
            return self.scope or self.row.scopes[kind]
        return "head" if kind == "attention" else str(self.scope)

    @property
    def macs_kinds(self) -> list[str]:
        """Kinds whose units compete with each other, of whatever kind they are, by what they save."""
        return [kind for kind in self.sparsity if self.scope_of(kind) == "macs"]

    def shares(self, scalar: float) -> dict[str, float]:
        """Sparsity per kind at a scalar, where a cost decides how much goes."""
        return {kind: share * scalar for kind, share in self.sparsity.items()}

    def costs(self, final: float | None = None) -> list[dict[str, float]]:
        """Fraction of the dense model's cost that may be left after each cycle; `final` of an absolute target."""
        ends = {cost: float(asked) if final is None else final for cost, asked in (self.target or {}).items()}
        left = {cost: [*(1 - gone for gone in self._leading_to(1 - end)[:-1]), end] for cost, end in ends.items()}
        return [{cost: steps[cycle] for cost, steps in left.items()} for cycle in range(self.cycles)]

    def progress(self, cycle: int, final: float | None = None) -> float:
        """How much of all that goes is gone after the cycle of that number, `final` as in `costs`; 1 after the last."""
        gone = max(self.sparsity.values()) if final is None else 1 - final
        return self._leading_to(gone)[cycle - 1] / gone if cycle < self.cycles and gone else 1.0

    def targets(self) -> list[dict[str, float]]:
        """Sparsity per kind after each cycle."""
        by_kind = {kind: self._leading_to(final) for kind, final in self.sparsity.items()}
        return [{kind: steps[cycle] for kind, steps in by_kind.items()} for cycle in range(self.cycles)]

    def epochs(self, last: int) -> list[int]:
        """Epochs of training after each cycle; the schedule's own, `last` after the last one."""
        steps = None if isinstance(self.schedule, str) else self.schedule.steps
        return spans(steps if isinstance(steps, dict) else None, self.cycles, last)

    def _leading_to(self, final: float) -> list[float]:
        if isinstance(self.schedule, str):
            return sparsities(final, self.cycles, self.schedule)
        steps, shape = self.schedule.steps, self.schedule.shape or "cubic"
        listed = list(steps.values()) if isinstance(steps, dict) else steps
        return sparsities(final, self.cycles, shape, self.schedule.initial, listed)


def plan_for(
    method: str,
    sparsity: Sparsity | None,
    scope: str | None = None,
    merge_heads_to: int | None = None,
    cycles: int = 1,
    schedule: str | Schedule = "cubic",
    setting: ScoreConfig = DEFAULT_SCORE_CONFIG,
    target: Target | None = None,
    correct_norms: bool = False,
    round_to: Widths | None = None,
    rules: Rules = (),
) -> Plan:
    """Check a method's settings against its row; a single sparsity applies to the row's usual kinds.

    A `target` such as {"macs": 0.5} or {"params": "12M"} takes the place of the sparsity; beside it, sparsities per
    kind are relative. `round_to` and `rules` are those of params.yaml.

    Raises:
        BadInput: unknown method, scope, kind or schedule, a sparsity outside 0..1, N:M with another sparsity, or a
            target, a width or a rule that is none.
    """
    row = method_named(method)
    implied = _refuse_scope(method, scope)
    if target is not None:
        target = {cost: parse_cost(asked) for cost, asked in target.items()}
        check(target, list(sparsity) if isinstance(sparsity, Mapping) else row.kinds)
        if implied is not None or isinstance(sparsity, float):
            raise BadInput("prune.target: takes a sparsity's place; set sparsity to null, or to a share for each kind")
        shares = relative(sparsity or dict.fromkeys(row.kinds, 1.0))
    elif sparsity is None and implied is None:
        raise BadInput(f"prune.sparsity: method {method} needs one; give the fraction to remove, 0 to 1")
    else:
        wanted = implied if sparsity is None else sparsity
        shares = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(row.kinds, float(wanted or 0))
    _refuse_shares(method, shares, 1.0 if target is None else math.inf)
    if implied is not None and (cycles > 1 or abs(shares["weight"] - implied) > 1e-9):
        raise BadInput(f"prune: an N:M scope removes {implied:g} at once; set sparsity to null and cycles to 1")
    if merge_heads_to is not None and "attention" not in shares:
        raise BadInput(f"prune.merge_heads_to {merge_heads_to}: merging heads needs kind attention; set it to null")
    widths, held = _widths(round_to, list(shares)), tuple(rule_of(rule, number) for number, rule in enumerate(rules))
    if implied is not None and any(rule.ignore is None for rule in held):
        raise BadInput("prune.rules: an N:M scope removes as much of every layer; rules can only ignore some")
    plan = Plan(method, shares, scope, merge_heads_to, cycles, schedule, setting, target, correct_norms, widths, held)
    _refuse_plan(plan)
    return plan


def _refuse_plan(plan: Plan) -> None:
    """Refuse what does not go together."""
    if len({plan.sparsity[kind] for kind in plan.macs_kinds}) > 1:
        raise BadInput(
            f"prune.sparsity: {', '.join(plan.macs_kinds)} compete for one share of the MACs; give all the same"
        )
    if plan.target is None:
        plan.targets()
    elif is_fraction(plan.target):
        plan.costs()
    elif isinstance(plan.schedule, Schedule) and plan.schedule.steps is not None:
        raise BadInput("prune.schedule.steps: are fractions, and the target is not; give a fraction, or a shape")
    else:
        plan.costs(0.0)
    plan.epochs(1)


def _widths(round_to: Widths | None, kinds: Sequence[str]) -> dict[str, int]:
    """The multiple of every kind that has one."""
    able = [kind for kind in kinds if kind in WIDTHS]
    if isinstance(round_to, int) and not able:
        raise BadInput(f"prune.round_to {round_to}: of {', '.join(kinds)} none is a width; set it to null")
    wanted = dict.fromkeys(able, round_to) if isinstance(round_to, int) else dict(round_to or {})
    for kind, multiple in wanted.items():
        if kind not in able:
            raise BadInput(f"prune.round_to.{kind}: is not among the widths that go here ({', '.join(able) or 'none'})")
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise BadInput(f"prune.round_to.{kind}: {multiple!r} is no whole number of at least 1")
    return wanted


def _refuse_scope(method: str, scope: str | None) -> float | None:
    """Check a scope against the method's row; returns the sparsity that it implies, if it does."""
    row = method_named(method)
    if scope and not row.free_scope:
        raise BadInput(f"prune.scope {scope!r}: method {method} has a scope of its own; leave it null")
    implied = sparsity_of(scope or row.scopes[row.kinds[0]])
    if scope and implied is None and scope not in (*SCOPES, "macs"):
        raise BadInput(f"prune.scope {scope!r}: unknown; use one of {', '.join(SCOPES)} (as in 2:4), macs")
    if implied is not None and "weight" not in row.scopes:
        raise BadInput(f"prune.scope {scope!r}: N:M is for single weights, which method {method} does not prune")
    return implied


def _refuse_shares(method: str, shares: Mapping[str, float], below: float) -> None:
    scopes = method_named(method).scopes
    if not shares:
        raise BadInput("prune.sparsity: names no kind; give the fraction to remove of at least one")
    for kind, share in shares.items():
        if kind not in scopes:
            raise BadInput(f"prune.sparsity.{kind}: method {method} prunes only {', '.join(scopes)}")
        if not 0 <= share < below:
            raise BadInput(f"prune.sparsity.{kind}: {share} is not at least 0 and below 1 (the fraction to remove)")
    if {"head", "attention"} <= set(shares):
        raise BadInput("prune.sparsity: head and attention cut the same axis; choose one of them")


def kinds_of(params: Params) -> Sequence[str]:
    """The kinds that params.yaml has scored: those it names, or the method's usual ones."""
    return params.prune.kinds or method_named(params.prune.method).kinds


def plan_of(params: Params) -> Plan:
    """The plan of a params.yaml.

    Raises:
        BadInput: a setting cannot be, or a kind is to be pruned that is not scored.
    """
    p, kinds = params.prune, kinds_of(params)
    one = 1.0 if p.target is not None and p.sparsity is None else p.sparsity  # for all kinds alike
    sparsity = dict.fromkeys(kinds, one) if isinstance(one, float) else one
    target = p.target.costs if p.target is not None else None
    plan = plan_for(
        p.method,
        sparsity,
        p.scope,
        p.merge_heads_to,
        p.cycles,
        p.schedule,
        _setting(params),
        target,
        p.correct_norms,
        p.round_to,
        p.rules,
    )
    unscored = [kind for kind in plan.sparsity if kind not in kinds]
    if unscored:
        raise BadInput(f"prune.sparsity.{unscored[0]}: only {', '.join(kinds)} are scored; add it to prune.kinds")
    return plan


def _setting(params: Params) -> ScoreConfig:
    """How criteria run."""
    s = params.score
    return ScoreConfig(
        seed=params.seed,
        memory=s.memory_mb << 20,
        fisher_directions=s.fisher_directions,
        autocast=s.autocast,
        confidence=s.confidence,
        fisher_block_size=s.fisher_block_size,
        damping=s.damping,
        num_gradients=s.num_gradients,
        gradient_batch=s.gradient_batch,
        per_sample=s.per_sample,
    )
