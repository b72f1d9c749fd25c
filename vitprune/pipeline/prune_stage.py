"""Gradual pruning that survives a kill: what each cycle begins and leaves is kept, and gone on from."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from vitprune import models
from vitprune.config.params import Params
from vitprune.groups import Group, Scores
from vitprune.pipeline import stage_context
from vitprune.pipeline.artifacts import History
from vitprune.pipeline.cycles import MASKS, read_statistics, write_cycle
from vitprune.pipeline.dense_stage import zeros_to_keep
from vitprune.pipeline.stage_context import OUT, StageCheckpoint
from vitprune.pruning.cycle_masks import groups_for
from vitprune.pruning.plan import Plan, plan_of
from vitprune.pruning.prune import Cycle, ResumePoint, prune_cycles
from vitprune.training.checkpoint import Snapshot, pack, unpack
from vitprune.training.checkpoint_store import Checkpoint
from vitprune.training.loop import FrozenZeros
from vitprune.training.optimizers import OptimizerState

MODEL, CYCLES = "model", OUT / "cycles"
Measured = dict[str, float]
Measure = Callable[[nn.Module], Measured]


@dataclass
class CompletedCycles:
    """What has been done so far: the model, its rows of plots/cycles.csv, what it was measured at, and what is kept.

    `kept` is the digest of the checkpoint of the last cycle, empty before there is one.
    """

    model: nn.Module
    rows: list[dict[str, Any]] = field(default_factory=list)
    measured: Measured = field(default_factory=dict)
    memory: OptimizerState = field(default_factory=dict)
    kept: str = ""


@dataclass(frozen=True)
class PrunedCycle:
    """A cycle whose units are gone and whose recovery is to come: the model, and what it was measured at."""

    cycle: Cycle
    model: nn.Module
    measured: Measured
    kept: str


def run(
    params: Params, place: StageCheckpoint, history: History, first_scores: Callable[[], Scores]
) -> CompletedCycles:
    """Prune the dense model cycle by cycle and recover after each, from where it was broken off.

    `first_scores` gives those that chose the first masks.
    """
    plan, done = plan_of(params), _done(place, history)
    measure = stage_context.make_evaluator(done.model, params)
    for pruned in _cycles(params, plan, place, done, measure):
        number, measured = pruned.cycle.number, pruned.measured
        evaluate = partial(measure, pruned.model)
        if params.prune.recover is not None:
            shelf = place.shelf(f"{number:02d}-training", pruned.kept)
            place.dist.broadcast(number)  # to those that follow
            held = _held(pruned.model, pruned.cycle, params)
            stage_context.finetune_cycle(
                pruned.model, pruned.cycle, plan, params, history, shelf, held, evaluate, done.memory, place.dist
            )
            measured = evaluate()
        scores = pruned.cycle.scores or first_scores()
        row = write_cycle(CYCLES, pruned.cycle, scores, pruned.model, pruned.measured["top1"], measured["top1"])
        done.model, done.measured, done.rows = pruned.model, measured, [*done.rows, row]
        if plan.cycles > 1 or params.prune.recover is not None:
            _keep_done(place, number, done, history)
    place.dist.broadcast(0)
    return done


def follow(params: Params, place: StageCheckpoint, history: History) -> None:
    """Train with the first process, which tells which cycle is next and has kept what it has pruned."""
    plan, memory = plan_of(params), OptimizerState()
    while number := place.dist.broadcast(0):
        saved = place.shelf(f"{number:02d}-pruned").written()
        if number > 1 and not memory:
            before = place.shelf(f"{number - 1:02d}-done").written()
            memory.update(unpack(Snapshot(before.tensors(), before.facts), "memory", stage_context.device()))
        dense = models.load(OUT / "dense")
        cycle, model = _cycle(saved, number, groups_for(dense, plan)), models.load(saved.directory / MODEL)
        shelf = place.shelf(f"{number:02d}-training", saved.sha256)
        model, held = model.to(stage_context.device()), _held(model, cycle, params)
        stage_context.finetune_cycle(model, cycle, plan, params, history, shelf, held, None, memory, place.dist)


def _held(model: nn.Module, cycle: Cycle, params: Params) -> FrozenZeros | None:
    own = FrozenZeros(cycle.held, cycle.masks) if cycle.held else None
    return zeros_to_keep(model, params, own, params.prune.hold_zeros)


def _cycles(
    params: Params, plan: Plan, place: StageCheckpoint, done: CompletedCycles, measure: Measure
) -> Iterator[PrunedCycle]:
    """The cycles that are still to be done, the first of which may have been pruned already."""
    number, model = len(done.rows), done.model
    dense = model if number == 0 else models.load(OUT / "dense").to(stage_context.device())
    masks = models.read_weights(CYCLES / f"{number:02d}" / MASKS) if number else {}
    recovers = params.prune.recover is not None
    if recovers and number < plan.cycles and (found := _pruned(place, number + 1, done.kept, dense, plan)):
        model, number, masks = found.model, found.cycle.number, found.cycle.masks
        yield found
    after = ResumePoint(dense, number, masks) if number else None
    first, statistics = models.read_weights(OUT / "mask" / MASKS), read_statistics(OUT / "score")
    for cycle in prune_cycles(model, plan, stage_context.calibration(dense, params), first, statistics, after):
        measured = measure(model)
        kept = _keep_pruned(place, cycle, model, measured, done.kept) if recovers else ""
        yield PrunedCycle(cycle, model, measured, kept)


def _done(place: StageCheckpoint, history: History) -> CompletedCycles:
    """What the cycles have left that are done and whole, the dense model if there are none; their files are there."""
    done, last = CompletedCycles(models.load(OUT / "dense")), None
    while (saved := place.shelf(f"{len(done.rows) + 1:02d}-done", done.kept).newest()) is not None:
        number = len(done.rows) + 1
        shutil.rmtree(CYCLES / f"{number:02d}", ignore_errors=True)
        shutil.copytree(saved.directory / MODEL, CYCLES / f"{number:02d}")
        done.rows, done.measured, done.kept, last = saved.facts["rows"], saved.facts["measured"], saved.sha256, saved
    if last is not None:
        done.model = models.load(last.directory / MODEL)
        history.restore(last.facts["history"])
        known = Snapshot(last.tensors(), last.facts)
        done.memory.update(unpack(known, "memory", stage_context.device()))
    done.model.to(stage_context.device())
    return done


def _keep_done(place: StageCheckpoint, number: int, done: CompletedCycles, history: History) -> None:
    known = pack(done.memory, "memory")
    facts = {"rows": done.rows, "measured": done.measured, "history": history.rows} | known.facts
    shelf = place.shelf(f"{number:02d}-done", done.kept, keep=1)
    saved = shelf.put(facts, known.tensors, lambda entry: shutil.copytree(CYCLES / f"{number:02d}", entry / MODEL))
    done.kept = saved.sha256
    for name in ("pruned", "training"):  # those of this cycle stay, in case that what it has left is lost
        place.shelf(f"{number - 1:02d}-{name}").clear()


def _keep_pruned(place: StageCheckpoint, cycle: Cycle, model: nn.Module, measured: Measured, before: str) -> str:
    tensors = {f"masks/{name}": mask for name, mask in cycle.masks.items()}
    tensors |= {f"scores/{name}": score for name, score in cycle.scores.items()}
    facts = {
        "target": dict(cycle.target),
        "cost": {name: dict(cost) for name, cost in cycle.cost.items()},
        "facts": dict(cycle.facts),
        "corrected": dict(cycle.corrected),
        "measured": measured,
    }
    shelf = place.shelf(f"{cycle.number:02d}-pruned", before, keep=1)
    return shelf.put(facts, tensors, lambda entry: models.save(model, entry / MODEL)).sha256


def _pruned(place: StageCheckpoint, number: int, before: str, dense: nn.Module, plan: Plan) -> PrunedCycle | None:
    saved = place.shelf(f"{number:02d}-pruned", before, keep=1).newest()
    if saved is None:
        return None
    model = models.load(saved.directory / MODEL).to(stage_context.device())
    return PrunedCycle(_cycle(saved, number, groups_for(dense, plan)), model, saved.facts["measured"], saved.sha256)


def _cycle(saved: Checkpoint, number: int, groups: list[Group]) -> Cycle:
    tensors, facts = saved.tensors(), saved.facts
    own = Cycle(number, facts["target"], groups, {}, {}, facts["cost"], facts["facts"], facts["corrected"])
    parts = {
        kind: {group.name: tensors[f"{kind}/{group.name}"] for group in groups if f"{kind}/{group.name}" in tensors}
        for kind in ("scores", "masks")
    }
    return replace(own, scores=parts["scores"], masks=parts["masks"])
