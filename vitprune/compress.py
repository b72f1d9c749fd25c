"""The heart: for each cycle score, select, apply; whoever drives it recovers the model in between."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.criteria import DEFAULTS, Batches, Criterion, Importance, Setting
from vitprune.criteria.racing import Settled
from vitprune.errors import BadInput
from vitprune.families import find_groups, merge_heads
from vitprune.groups import Group, Masks, Scores, shrink, zero
from vitprune.methods import CRITERIA, Method, method_named
from vitprune.schedule import sparsities
from vitprune.select import SCOPES, Contest, contests, select, sparsity_of

Sparsity = float | Mapping[Any, float]  # one for all kinds, or one per kind


@dataclass(frozen=True)
class Plan:
    """What to do to a model: method, final sparsity per kind, and the schedule that leads there."""

    method: str
    sparsity: Mapping[str, float]
    scope: str | None = None
    heads: int | None = None
    cycles: int = 1
    schedule: str = "cubic"
    setting: Setting = DEFAULTS

    @property
    def row(self) -> Method:
        """The method's row in the table."""
        return method_named(self.method)

    def setting_of(self, cycle: int) -> Setting:
        """How the cycle of that number scores: every one has a seed of its own."""
        return replace(self.setting, seed=self.setting.seed + cycle)

    def scope_of(self, kind: str) -> str:
        """Who competes among the units of a kind; attention channels always compete inside their head."""
        return self.scope if self.scope and kind != "attention" else self.row.scopes[kind]

    def targets(self) -> list[dict[str, float]]:
        """Sparsity per kind after each cycle."""
        by_kind = {kind: sparsities(final, self.cycles, self.schedule) for kind, final in self.sparsity.items()}
        return [{kind: steps[cycle] for kind, steps in by_kind.items()} for cycle in range(self.cycles)]


@dataclass(frozen=True)
class Cycle:
    """One step: `masks` and `scores` are in the dense model's coordinates, masks cumulative (zeros only grow)."""

    number: int
    target: Mapping[str, float]
    groups: Sequence[Group]
    scores: Scores
    masks: Masks
    facts: Mapping[str, float] = field(default_factory=dict)  # about what was settled by measuring again

    @property
    def held(self) -> list[Group]:
        """Groups whose removed weights are still there as zeros, and must be held at zero in training."""
        return [group for group in self.groups if group.kind == "weight"]


def plan_for(
    method: str,
    sparsity: Sparsity | None,
    scope: str | None = None,
    heads: int | None = None,
    cycles: int = 1,
    schedule: str = "cubic",
    setting: Setting = DEFAULTS,
) -> Plan:
    """Check a method's settings against its row; a single sparsity applies to the row's usual kinds.

    Raises:
        BadInput: unknown method, scope, kind or schedule, a sparsity outside 0..1, or N:M with another sparsity.
    """
    row = method_named(method)
    if scope and not row.free_scope:
        raise BadInput(f"prune.scope {scope!r}: method {method} has a scope of its own; leave it null")
    implied = sparsity_of(scope or row.scopes[row.kinds[0]])
    if scope and implied is None and scope not in SCOPES:
        raise BadInput(f"prune.scope {scope!r}: unknown; use one of {', '.join(SCOPES)} (as in 2:4)")
    if implied is not None and "weight" not in row.scopes:
        raise BadInput(f"prune.scope {scope!r}: N:M is for single weights, which method {method} does not prune")
    if sparsity is None and implied is None:
        raise BadInput(f"prune.sparsity: method {method} needs one; give the fraction to remove, 0 to 1")
    wanted = implied if sparsity is None else sparsity
    shares = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(row.kinds, float(wanted or 0))
    if not shares:
        raise BadInput("prune.sparsity: names no kind; give the fraction to remove of at least one")
    for kind, share in shares.items():
        if kind not in row.scopes:
            raise BadInput(f"prune.sparsity.{kind}: method {method} prunes only {', '.join(row.scopes)}")
        if not 0 <= share < 1:
            raise BadInput(f"prune.sparsity.{kind}: {share} is not at least 0 and below 1 (the fraction to remove)")
    if implied is not None and (cycles > 1 or abs(shares["weight"] - implied) > 1e-9):
        raise BadInput(f"prune: an N:M scope removes {implied:g} at once; set sparsity to null and cycles to 1")
    if heads is not None and "attention" not in shares:
        raise BadInput(f"prune.heads {heads}: merges heads where attention channels go, and none do; set it to null")
    if {"head", "attention"} <= set(shares):
        raise BadInput("prune.sparsity: head and attention cut the same axis; choose one of them")
    plan = Plan(method, shares, scope, heads, cycles, schedule, setting)
    plan.targets()
    return plan


def groups_for(model: nn.Module, plan: Plan) -> list[Group]:
    """The groups that a plan prunes, heads merged where it says so."""
    return merge_heads(model, find_groups(model, list(plan.sparsity)), plan.heads)


def score(
    model: nn.Module, groups: Sequence[Group], criterion: str | Criterion, batches: Batches = (), seed: int = 0
) -> Scores:
    """One score per unit, larger = worth more; `criterion` is a name in CRITERIA or a function.

    Raises:
        BadInput: no criterion of that name, or it needs batches.
    """
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise BadInput(f"criterion {criterion!r}: unknown; use one of {', '.join(CRITERIA)}")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    return function(model, groups, _lasting(batches), Setting(seed)).scores


def choose(
    scores: Scores, groups: Sequence[Group], plan: Plan, target: Mapping[str, float], kept: Masks | None = None
) -> Masks:
    """Masks of one cycle, each kind by its own scope; structured groups keep at least one unit.

    What the cycles before have kept is in `kept`; None where there is none before.
    """
    masks: Masks = {}
    for kind, share in target.items():
        same = [group for group in groups if group.kind == kind]
        own = {group.name: scores[group.name] for group in same}
        floor = 0 if kind == "weight" else 1
        masks |= select(own, share, plan.scope_of(kind), same, kept, floor)
    return masks


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
    found = [group for group in groups_for(model, plan) if group.kind in target]
    own = {group.name: scores[group.name] for group in found}
    return plan.row.settle(model, found, batches, own, now, plan.setting_of(cycle))


def compress(model: nn.Module, plan: Plan, batches: Batches, first: Masks | None = None) -> Iterator[Cycle]:
    """Prune a model in place, cycle by cycle; what drives the iterator may train the model between two cycles.

    `first` gives the masks of the first cycle, where they were chosen before; for its update, a method still scores.
    """
    batches = _lasting(batches)
    dense = groups_for(model, plan)
    kept = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in dense}
    for number, target in enumerate(plan.targets(), start=1):
        now = groups_for(model, plan)
        scores: Scores = {}
        facts: Mapping[str, float] = {}
        importance = Importance({})
        if number > 1 or first is None or plan.row.update:
            importance = plan.row.criterion(model, now, batches, plan.setting_of(number))
            settled = settle(model, batches, importance.scores, dense, plan, target, number, kept)
            scores, facts = {group.name: _in_dense(group, settled.scores, kept) for group in dense}, settled.facts
        masks = first if first is not None and number == 1 else choose(scores, dense, plan, target, kept)
        _apply(model, now, masks, kept, importance)
        kept = masks
        yield Cycle(number, target, dense, scores, masks, facts)


def prune(
    model: nn.Module,
    method: str,
    sparsity: Sparsity | None,
    batches: Batches = (),
    example_input: Tensor | None = None,
    *,
    scope: str | None = None,
    heads: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Prune a copy of a timm model in one shot and return it; the model itself is untouched.

    `sparsity` is the fraction of units to remove, one for all kinds or one per kind; `batches` are (images, labels)
    for the methods that look at data; `example_input` (B, C, H, W), if given, is run through the result.

    Raises:
        BadInput: a setting, a module or the result cannot be used; the message names it.
    """
    pruned = copy.deepcopy(model)
    for _ in compress(pruned, plan_for(method, sparsity, scope, heads, setting=Setting(seed)), batches):
        pass
    if example_input is not None:
        with torch.no_grad():
            answer = pruned.eval()(example_input)
        if not bool(answer.isfinite().all()):
            raise BadInput(f"{type(model).__name__}: the pruned model's output is not finite; check the dense model's")
        pruned.train(model.training)
    return pruned


def _lasting(batches: Batches) -> Batches:
    """Refuse what can be read only once: every cycle reads all batches again."""
    if isinstance(batches, Iterator):
        raise BadInput("batches: an iterator is used up after one pass; give a list, a tuple or a DataLoader")
    return batches


def _in_dense(group: Group, scores: Scores, kept: Masks) -> Tensor:
    """Scores of the living units at their places in the dense group; shape of the dense group."""
    own = scores[group.name].to("cpu", torch.float64)
    if group.kind == "weight":
        return own
    full = torch.zeros(group.units, dtype=torch.float64)
    full[kept[group.name].flatten()] = own.flatten()
    return full.view(group.shape)


@torch.no_grad()
def _apply(model: nn.Module, now: Sequence[Group], masks: Masks, kept: Masks, importance: Importance) -> None:
    """Weights become zero, units are cut out; first the survivors take their update, if there is one."""
    weights = [group for group in now if group.kind == "weight"]
    units = [group for group in now if group.kind != "weight"]
    living = {g.name: masks[g.name].flatten()[kept[g.name].flatten()].view(g.shape) for g in units}
    if importance.update is not None:
        for name, value in importance.update(living | {g.name: masks[g.name] for g in weights}).items():
            model.get_parameter(name).copy_(value)
    zero(model, weights, masks)
    shrink(model, units, living)
