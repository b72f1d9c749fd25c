"""The heart: for each cycle score, select, apply; whoever drives it recovers the model in between."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Criterion, Importance, Setting
from vitprune.criteria.racing import Settled
from vitprune.depth import dense_names, living, next_step
from vitprune.errors import BadInput
from vitprune.families import find_groups, merge_heads
from vitprune.groups import Group, Masks, Scores, shrink, zero
from vitprune.methods import CRITERIA
from vitprune.plans import Plan, Sparsity, plan_for
from vitprune.select import Contest, contests, select, select_blocks
from vitprune.targets import PRECISION, Meter, meter, solve


@dataclass(frozen=True)
class Cycle:
    """One step: `masks` and `scores` are in the dense model's coordinates, masks cumulative (zeros only grow).

    `target` is the sparsity per kind; `cost`, where the plan has one, what was wanted and reached of it.
    """

    number: int
    target: Mapping[str, float]
    groups: Sequence[Group]
    scores: Scores
    masks: Masks
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)  # about what was settled by measuring again

    @property
    def held(self) -> list[Group]:
        """Groups whose removed weights are still there as zeros, and must be held at zero in training."""
        return [group for group in self.groups if group.kind == "weight"]


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

    What the cycles before have kept is in `kept`; None where there is none before. A kind that `target` does not name
    stays as it is. Blocks go first: what belongs to them goes too, and a share is one of what they leave.
    """
    masks = dict(kept) if kept else {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    for kind, share in sorted(target.items(), key=lambda pair: pair[0] != "block"):
        same = [group for group in living(groups, masks) if group.kind == kind]
        own = {group.name: scores[group.name] for group in same}
        if kind == "block":
            masks |= select_blocks(own, share, kept)
        else:
            masks |= select(own, share, plan.scope_of(kind), same, kept, 0 if kind == "weight" else 1)
    alive = {group.name for group in living(groups, masks)}
    return {name: mask if name in alive else torch.zeros_like(mask) for name, mask in masks.items()}


def goal(
    scores: Scores, groups: Sequence[Group], plan: Plan, number: int, share_of: Meter | None, kept: Masks | None = None
) -> Mapping[str, float]:
    """Sparsity per kind after a cycle: the plan's own, or what its cost asks for."""
    if share_of is None:
        return plan.targets()[number - 1]
    ((cost, limit),) = plan.costs()[number - 1].items()
    return plan.shares(
        solve(lambda scalar: choose(scores, groups, plan, plan.shares(scalar), kept), share_of, limit, PRECISION[cost])
    )


def meter_for(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Meter | None:
    """What measures candidates for a plan with a cost; the model must still be the dense one."""
    return meter(model, groups, next(iter(plan.target))) if plan.target else None


def cost_of(masks: Masks, plan: Plan, number: int, share_of: Meter | None) -> dict[str, dict[str, float]]:
    """What a cycle was to cost and costs, as fractions of the dense model; empty where the plan has no cost."""
    if share_of is None:
        return {}
    return {cost: {"target": limit, "reached": share_of(masks)} for cost, limit in plan.costs()[number - 1].items()}


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
    share_of = meter_for(model, dense, plan)
    for number in range(1, plan.cycles + 1):
        complete = False
        while not complete:
            now = groups_for(model, plan)
            names = dense_names(dense, now, kept)
            scores: Scores = {}
            facts: Mapping[str, float] = {}
            importance = Importance({})
            if first is None or plan.row.update:
                importance = plan.row.criterion(model, now, batches, plan.setting_of(number))
                scores = _all_in_dense(dense, names, importance.scores, kept)
            target: Mapping[str, float]
            if first is not None and share_of is not None:
                masks, target, complete = first, _removed(dense, first), "block" not in plan.sparsity
            else:
                target = goal(scores, dense, plan, number, share_of, kept)
                step = next_step(dense, target, kept)
                if first is None:
                    settled = settle(model, batches, importance.scores, dense, plan, step, number, kept)
                    scores, facts = _all_in_dense(dense, names, settled.scores, kept), settled.facts
                masks = choose(scores, dense, plan, step, kept) if first is None else first
                complete = step == target
            _apply(model, [(group, names[group.name]) for group in now], masks, kept, importance)
            kept, first = masks, None
        yield Cycle(number, target, dense, scores, masks, cost_of(masks, plan, number, share_of), facts)


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
    target: Mapping[str, float] | None = None,
) -> nn.Module:
    """Prune a copy of a timm model in one shot and return it; the model itself is untouched.

    `sparsity` is the fraction of units to remove, one for all kinds or one per kind; `batches` are (images, labels)
    for the methods that look at data; `target`, such as {"macs": 0.5}, takes the
    sparsity's place; `example_input` (B, C, H, W), if given, is run through the result.

    Raises:
        BadInput: a setting, a module or the result cannot be used; the message names it.
    """
    pruned = copy.deepcopy(model)
    for _ in compress(pruned, plan_for(method, sparsity, scope, heads, setting=Setting(seed), target=target), batches):
        pass
    if example_input is not None:
        with torch.no_grad():
            answer = pruned.eval()(example_input)
        if not bool(answer.isfinite().all()):
            raise BadInput(f"{type(model).__name__}: the pruned model's output is not finite; check the dense model's")
        pruned.train(model.training)
    return pruned


def _removed(groups: Sequence[Group], masks: Masks) -> dict[str, float]:
    """Share of the units of each kind that masks remove."""
    units, gone = Counter[str](), Counter[str]()
    for group in groups:
        units[group.kind] += group.units
        gone[group.kind] += int((~masks[group.name]).sum())
    return {kind: gone[kind] / units[kind] for kind in units}


def _lasting(batches: Batches) -> Batches:
    """Refuse what can be read only once: every cycle reads all batches again."""
    if isinstance(batches, Iterator):
        raise BadInput("batches: an iterator is used up after one pass; give a list, a tuple or a DataLoader")
    return batches


def _all_in_dense(dense: Sequence[Group], names: Mapping[str, str], scores: Scores, kept: Masks) -> Scores:
    """Scores of the model as it is, `names` its groups' names in the dense model, at their places there."""
    own = {names[name]: score for name, score in scores.items()}
    return {group.name: _in_dense(group, own, kept) for group in dense}


def _in_dense(group: Group, scores: Scores, kept: Masks) -> Tensor:
    """Scores of the living units at their places in the dense group; shape of the dense group."""
    if group.name not in scores:  # it has gone with its block
        return torch.zeros(group.shape, dtype=torch.float64)
    own = scores[group.name].to("cpu", torch.float64)
    if group.kind == "weight":
        return own
    full = torch.zeros(group.units, dtype=torch.float64)
    full[kept[group.name].flatten()] = own.flatten()
    return full.view(group.shape)


@torch.no_grad()
def _apply(
    model: nn.Module, now: Sequence[tuple[Group, str]], masks: Masks, kept: Masks, importance: Importance
) -> None:
    """Weights become zero, units are cut out; first the survivors take their update, if there is one.

    `now` has the groups of the model as it is, each with its name in the dense model.
    """
    weights = [group for group, _ in now if group.kind == "weight"]
    units = [(group, name) for group, name in now if group.kind != "weight"]
    left = {g.name: masks[name].flatten()[kept[name].flatten()].view(g.shape) for g, name in units}
    if importance.update is not None:
        for name, value in importance.update(left | {g.name: masks[g.name] for g in weights}).items():
            model.get_parameter(name).copy_(value)
    zero(model, weights, masks)
    shrink(model, [group for group, _ in units], left)
