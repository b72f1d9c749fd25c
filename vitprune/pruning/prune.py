"""The heart: for each cycle score, select, apply; whoever drives it recovers the model in between."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Criterion, Importance, ScoreConfig, Statistics
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores, shrink, zero
from vitprune.pruning.block_steps import next_block_removal, to_dense_names
from vitprune.pruning.cycle_masks import (
    cost_model_for,
    cycle_target,
    groups_for,
    reached_cost,
    rescore_borderline,
    select_masks,
)
from vitprune.pruning.methods import CRITERIA
from vitprune.pruning.norm_correction import correct_norms as correction
from vitprune.pruning.norm_correction import dense_logits
from vitprune.pruning.plan import Plan, Rules, Sparsity, Target, Widths, plan_for


@dataclass(frozen=True)
class Cycle:
    """One step: `masks` and `scores` are in the dense model's coordinates, masks cumulative (zeros only grow).

    `target` is the sparsity per kind; `cost`, where the plan has one, what was wanted and reached of it, and why a miss
    is larger than 2 %.
    """

    number: int
    target: Mapping[str, float]
    groups: Sequence[Group]
    scores: Scores
    masks: Masks
    cost: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)  # about what was settled by measuring again
    corrected: Mapping[str, float] = field(default_factory=dict)  # what a correction did on images that it did not see

    @property
    def held(self) -> list[Group]:
        """Groups whose removed weights are still there as zeros, and must be held at zero in training."""
        return [group for group in self.groups if group.kind == "weight"]


@dataclass(frozen=True)
class ResumePoint:
    """Where a run was broken off: the dense model that it began with, the last cycle done, and its masks."""

    dense: nn.Module
    number: int
    masks: Masks


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
    return function(model, groups, _lasting(batches), ScoreConfig(seed)).scores


def prune_cycles(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    first: Masks | None = None,
    statistics: Statistics | None = None,
    after: ResumePoint | None = None,
) -> Iterator[Cycle]:
    """Prune a model in place, cycle by cycle; what drives the iterator may train the model between two cycles.

    `first` gives the masks of the first cycle, where they were chosen before, and `statistics` what scoring left for
    the update then; without them a method with an update scores again. With `after`, the model is what the last cycle
    done has left, and the next one follows as if nothing had happened.
    """
    batches, whole = _lasting(batches), model if after is None else after.dense
    dense = groups_for(whole, plan)
    kept = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in dense} if after is None else after.masks
    costs = cost_model_for(whole, dense, plan)
    dense_answers = dense_logits(whole, batches) if plan.correct_norms else []
    first = first if after is None else None  # it has been applied
    for number in range(1 if after is None else after.number + 1, plan.cycles + 1):
        complete = False
        while not complete:
            now = groups_for(model, plan)
            names = to_dense_names(dense, now, kept)
            scores: Scores = {}
            facts: Mapping[str, float] = {}
            last = ""
            importance = _judged(model, now, batches, plan, number, first is not None, statistics)
            if importance.scores:
                scores = _all_in_dense(dense, names, importance.scores, kept)
            target: Mapping[str, float]
            if first is not None and costs.share_of is not None:
                masks, target, complete = first, _removed(dense, first), "block" not in plan.sparsity
            else:
                wanted = cycle_target(scores, dense, plan, number, costs, kept)
                target, step, last = wanted.target, next_block_removal(dense, wanted.target, kept), wanted.last
                if first is None:
                    settled = rescore_borderline(
                        model, batches, importance.scores, dense, plan, step, number, kept, costs
                    )
                    scores, facts = _all_in_dense(dense, names, settled.scores, kept), settled.facts
                masks = select_masks(scores, dense, plan, step, kept, costs, number) if first is None else first
                complete = step == target
            _apply(model, [(group, names[group.name]) for group in now], masks, kept, importance)
            kept, first = masks, None
        corrected = _corrected(model, dense_answers, batches, plan, number)
        cost = reached_cost(masks, plan, number, costs, last)
        yield Cycle(number, target, dense, scores, masks, cost, facts, corrected)


def prune(
    model: nn.Module,
    method: str,
    sparsity: Sparsity | None,
    batches: Batches = (),
    example_input: Tensor | None = None,
    *,
    scope: str | None = None,
    merge_heads_to: int | None = None,
    seed: int = 0,
    target: Target | None = None,
    correct_norms: bool = False,
    round_to: Widths | None = None,
    rules: Rules = (),
) -> nn.Module:
    """Prune a copy of a timm model in one shot and return it; the model itself is untouched.

    `sparsity` is the fraction of units to remove, one for all kinds or one per kind; `batches` are (images, labels)
    for the methods that look at data; `target`, such as {"macs": 0.5}, {"params": "12M"} or {"latency_ms": 20}, takes
    the sparsity's place; of every group a multiple of `round_to` stays, one number for all widths or one per kind;
    `rules` hold for single groups, as {"match": "blocks.0.mlp", "ignore": True}; `correct_norms` moves norms and
    biases towards the dense answers afterwards, without labels; `example_input` (B, C, H, W), if given, is run
    through the result.

    Raises:
        BadInput: a setting, a module or the result cannot be used; the message names it.
    """
    pruned = copy.deepcopy(model)
    setting = ScoreConfig(seed)
    plan = plan_for(
        method,
        sparsity,
        scope,
        merge_heads_to,
        setting=setting,
        target=target,
        correct_norms=correct_norms,
        round_to=round_to,
        rules=rules,
    )
    for _ in prune_cycles(pruned, plan, batches):
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


def _judged(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    plan: Plan,
    number: int,
    chosen: bool,
    statistics: Statistics | None,
) -> Importance:
    """Scores and update of a cycle; where the masks are chosen, only the update, from statistics if there are any."""
    update, again = plan.row.update, plan.row.again
    if chosen and again is not None:
        return Importance({}, again(model, groups, batches, plan.setting_of(number)))
    if chosen and update is None:
        return Importance({})
    if chosen and update is not None and statistics:
        return Importance({}, update(model, groups, statistics))
    return plan.row.criterion(model, groups, batches, plan.setting_of(number))


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


def _corrected(
    model: nn.Module, wanted: Sequence[Tensor], batches: Batches, plan: Plan, number: int
) -> Mapping[str, float]:
    """Move the model towards the dense answers, where the plan says so; returns figures about it."""
    if not plan.correct_norms:
        return {}
    found = correction(model, wanted, batches, plan.setting_of(number))
    _put(model, found.values)
    return found.facts


@torch.no_grad()
def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


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
        _put(model, importance.update(left | {g.name: masks[g.name] for g in weights}))
    zero(model, weights, masks)
    shrink(model, [group for group, _ in units], left)
