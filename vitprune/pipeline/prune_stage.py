"""The prune stage: gradual pruning with a checkpoint after the pruning and after the fine-tuning of every cycle."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vitprune import models
from vitprune.config.params import Params
from vitprune.groups import Group, Masks, Scores
from vitprune.models.weights import read_optional_weights
from vitprune.pipeline.artifacts import MASKS, SCORES, History, model_facts, summary_rows, write_masks
from vitprune.pipeline.dense_stage import zeros_to_keep
from vitprune.pipeline.project_data import CALIBRATION, MANIFEST, METRICS, OUT, PLOTS, calibration, device
from vitprune.pipeline.score_stage import ORDERS, STATISTICS, load_prepared
from vitprune.pipeline.stage_training import Evaluate, StageCheckpoint, make_evaluator, stage_checkpoint, train_model
from vitprune.pruning.block_steps import dense_paths
from vitprune.pruning.cycle_masks import groups_for
from vitprune.pruning.plan import Plan, plan_of
from vitprune.pruning.prune_cycles import Cycle, ResumePoint, prune_cycles
from vitprune.pruning.reconstruct import Reconstruction
from vitprune.runtime import tables
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from vitprune.runtime.files import write_csv, write_json
from vitprune.training.checkpoint import Snapshot, pack, unpack
from vitprune.training.checkpoint_store import Checkpoint, CheckpointStore
from vitprune.training.distillation import classification
from vitprune.training.finetune import RecoverySegment
from vitprune.training.loop import FrozenZeros
from vitprune.training.optimizers import OptimizerState

MODEL, CYCLES = "model", OUT / "cycles"
Metrics = dict[str, float]
Evaluator = Callable[[nn.Module], Metrics]


@dataclass
class CompletedCycles:
    """The cycles that have been completed.

    Attributes:
        model: The model after the last of them.
        rows: Their rows of plots/cycles.csv.
        metrics: Accuracy of the model.
        memory: Optimizer state after the last fine-tuning.
        checkpoint: SHA-256 of the checkpoint of the last cycle; empty before the first.
    """

    model: nn.Module
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)
    memory: OptimizerState = field(default_factory=dict)
    checkpoint: str = ""


@dataclass(frozen=True)
class PrunedCycle:
    """A cycle that has been pruned and not yet fine-tuned.

    Attributes:
        cycle: The cycle's masks, scores and cost.
        model: The pruned model.
        metrics: Accuracy before fine-tuning.
        checkpoint: SHA-256 of its checkpoint; empty without fine-tuning.
    """

    cycle: Cycle
    model: nn.Module
    metrics: Metrics
    checkpoint: str


def run(params: Params) -> None:
    """Prune cycle by cycle and fine-tune after each; write model, masks, scores and metrics of every cycle.

    The model of a cycle is that of the last epoch of its fine-tuning, not the best on the eval split.
    """
    inputs = [MANIFEST, CALIBRATION, OUT / "dense", OUT / "score", OUT / "mask"]
    with process_group(device()) as dist, stage_checkpoint("prune", params, inputs, dist) as checkpoint:
        history = History(OUT / "prune", "prune", dist.rank == 0)
        if dist.rank:
            _follow(params, checkpoint, history)
            return
        done = _run_cycles(params, checkpoint, history)
        history.close(PLOTS / "prune.csv")
        write_csv(PLOTS / "cycles.csv", done.rows)
        models.save(done.model, OUT / "prune")
        facts = model_facts(done.model, OUT / "prune") | done.metrics | {"cycles": len(done.rows)}
        write_json(METRICS / "prune.json", facts)


def finetune_cycle(
    model: nn.Module,
    cycle: Cycle,
    plan: Plan,
    params: Params,
    history: History,
    store: CheckpointStore,
    frozen_zeros: FrozenZeros | None,
    evaluate: Evaluate | None = None,
    memory: OptimizerState | None = None,
    dist: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Fine-tune the model of a cycle with the settings of `prune.finetune` and the epochs of the schedule.

    Args:
        model: The pruned model.
        cycle: The cycle that pruned it.
        plan: The pruning plan.
        params: The project's params.yaml.
        history: Training curve to append to.
        store: Checkpoints of this training.
        frozen_zeros: Weights to keep at zero.
        evaluate: Evaluation after every epoch; None for none.
        memory: Optimizer state, carried from cycle to cycle if the recipe keeps it; pass the same one every time.
        dist: Process group.
    """
    recipe = params.prune.finetune
    if recipe is None:
        return
    epochs = plan.epochs(recipe.epochs)
    kept, paths = memory if recipe.optimizer_state == "keep" else None, dense_paths(cycle.groups, cycle.masks)
    segment = RecoverySegment(cycle.number, epochs, kept, paths)
    recipe = recipe.model_copy(update={"epochs": epochs[cycle.number - 1]})
    task = classification(model, recipe.smoothing)
    train_model(task, recipe, params, history, store, frozen_zeros, evaluate, segment, dist)


def cycle_row(number: int, groups: Sequence[Group], masks: Masks, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of plots/cycles.csv of a cycle.

    Args:
        number: Number of the cycle.
        groups: Groups of the dense model.
        masks: Masks of the cycle.
        facts: Content of its metrics.json.
    """
    units = sum(group.units for group in groups)
    removed = units - sum(int(mask.sum()) for mask in masks.values())
    columns = ("top1_before", "top1_after", "params", "macs", "nonzero_params", "nonzero_macs")
    return {"cycle": number, "sparsity": removed / units} | {column: facts[column] for column in columns}


def _run_cycles(params: Params, checkpoint: StageCheckpoint, history: History) -> CompletedCycles:
    """Run the remaining cycles on rank 0."""
    plan = plan_of(params)
    done = _completed(checkpoint, history, plan)
    evaluator = make_evaluator(done.model, params)
    for pruned in _cycles(params, plan, checkpoint, done, evaluator):
        cycle, model, metrics = pruned.cycle, pruned.model, pruned.metrics
        for epoch in cycle.reconstruction.curve:
            history.add(epoch, cycle.number)
        if params.prune.finetune is not None:
            evaluate = partial(evaluator, model)
            store = checkpoint.store(f"{cycle.number:02d}-training", pruned.checkpoint)
            checkpoint.dist.broadcast(cycle.number)  # received in _follow
            frozen, memory, dist = _frozen(model, cycle, params), done.memory, checkpoint.dist
            finetune_cycle(model, cycle, plan, params, history, store, frozen, evaluate, memory, dist)
            metrics = evaluate()
        row = _write_cycle(cycle, cycle.scores or _mask_scores(), model, pruned.metrics["top1"], metrics["top1"])
        done.model, done.metrics, done.rows = model, metrics, [*done.rows, row]
        if plan.config.cycles > 1 or params.prune.finetune is not None:
            _save_completed(checkpoint, cycle.number, done, history)
    checkpoint.dist.broadcast(0)
    return done


def _follow(params: Params, checkpoint: StageCheckpoint, history: History) -> None:
    """Join the fine-tuning of every cycle on the other ranks, from the checkpoint that rank 0 has written."""
    plan, memory = plan_of(params), OptimizerState()
    while number := checkpoint.dist.broadcast(0):
        saved = checkpoint.store(f"{number:02d}-pruned").latest_unverified()
        if number > 1 and not memory:
            before = checkpoint.store(f"{number - 1:02d}-done").latest_unverified()
            memory.update(unpack(Snapshot(before.tensors(), before.facts), "memory", device()))
        dense = load_prepared(plan)
        cycle, model = _cycle_of(saved, number, groups_for(dense, plan)), models.load(saved.directory / MODEL)
        store = checkpoint.store(f"{number:02d}-training", saved.sha256)
        model, frozen = model.to(device()), _frozen(model, cycle, params)
        finetune_cycle(model, cycle, plan, params, history, store, frozen, None, memory, checkpoint.dist)


def _frozen(model: nn.Module, cycle: Cycle, params: Params) -> FrozenZeros | None:
    pruned = FrozenZeros(cycle.zeroed, cycle.masks) if cycle.zeroed else None
    return zeros_to_keep(model, params, pruned, params.prune.keep_zeros)


def _cycles(
    params: Params, plan: Plan, checkpoint: StageCheckpoint, done: CompletedCycles, evaluator: Evaluator
) -> Iterator[PrunedCycle]:
    """Yield the remaining cycles; the first may have been pruned before an interruption."""
    number, model = len(done.rows), done.model
    dense = model if number == 0 else load_prepared(plan).to(device())
    masks = models.read_weights(CYCLES / f"{number:02d}" / MASKS) if number else {}
    finetunes = params.prune.finetune is not None
    if finetunes and number < plan.config.cycles:
        pruned = _load_pruned(checkpoint, number + 1, done.checkpoint, dense, plan)
        if pruned is not None:
            model, number, masks = pruned.model, pruned.cycle.number, pruned.cycle.masks
            yield pruned
    resume = ResumePoint(dense, number, masks) if number else None
    first = models.read_weights(OUT / "mask" / MASKS)
    statistics, orders = (read_optional_weights(OUT / "score" / name) for name in (STATISTICS, ORDERS))
    for cycle in prune_cycles(model, plan, calibration(dense, params), first, statistics, resume, orders):
        metrics = evaluator(model)
        sha256 = _save_pruned(checkpoint, cycle, model, metrics, done.checkpoint) if finetunes else ""
        yield PrunedCycle(cycle, model, metrics, sha256)


def _completed(checkpoint: StageCheckpoint, history: History, plan: Plan) -> CompletedCycles:
    """Load the completed cycles and write their files; the dense model if there are none."""
    done, last = CompletedCycles(load_prepared(plan)), None
    while (saved := checkpoint.store(f"{len(done.rows) + 1:02d}-done", done.checkpoint).latest()) is not None:
        folder = CYCLES / f"{len(done.rows) + 1:02d}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved.directory / MODEL, folder)
        done.rows, done.metrics, last = saved.facts["rows"], saved.facts["measured"], saved
        done.checkpoint = saved.sha256
    if last is not None:
        done.model = models.load(last.directory / MODEL)
        history.restore(last.facts["history"])
        done.memory.update(unpack(Snapshot(last.tensors(), last.facts), "memory", device()))
    done.model.to(device())
    return done


def _save_completed(checkpoint: StageCheckpoint, number: int, done: CompletedCycles, history: History) -> None:
    memory = pack(done.memory, "memory")
    facts = {"rows": done.rows, "measured": done.metrics, "history": history.rows} | memory.facts
    store = checkpoint.store(f"{number:02d}-done", done.checkpoint, keep=1)
    saved = store.save(facts, memory.tensors, lambda entry: shutil.copytree(CYCLES / f"{number:02d}", entry / MODEL))
    done.checkpoint = saved.sha256
    for name in ("pruned", "training"):  # keep those of this cycle, in case its last checkpoint is damaged
        checkpoint.store(f"{number - 1:02d}-{name}").clear()


def _save_pruned(checkpoint: StageCheckpoint, cycle: Cycle, model: nn.Module, metrics: Metrics, parent: str) -> str:
    tensors = {f"masks/{name}": mask for name, mask in cycle.masks.items()}
    tensors |= {f"scores/{name}": score for name, score in cycle.scores.items()}
    facts = {
        "target": dict(cycle.target),
        "cost": {name: dict(cost) for name, cost in cycle.cost.items()},
        "facts": dict(cycle.facts),
        "corrected": dict(cycle.corrected),
        "reconstruction": asdict(cycle.reconstruction),
        "allocation": dict(cycle.allocation),
        "measured": metrics,
    }
    store = checkpoint.store(f"{cycle.number:02d}-pruned", parent, keep=1)
    return store.save(facts, tensors, lambda entry: models.save(model, entry / MODEL)).sha256


def _load_pruned(
    checkpoint: StageCheckpoint, number: int, parent: str, dense: nn.Module, plan: Plan
) -> PrunedCycle | None:
    saved = checkpoint.store(f"{number:02d}-pruned", parent, keep=1).latest()
    if saved is None:
        return None
    model = models.load(saved.directory / MODEL).to(device())
    return PrunedCycle(_cycle_of(saved, number, groups_for(dense, plan)), model, saved.facts["measured"], saved.sha256)


def _cycle_of(saved: Checkpoint, number: int, groups: list[Group]) -> Cycle:
    tensors, facts = saved.tensors(), saved.facts
    scores, masks = (
        {group.name: tensors[f"{part}/{group.name}"] for group in groups if f"{part}/{group.name}" in tensors}
        for part in ("scores", "masks")
    )
    return Cycle(
        number=number,
        target=facts["target"],
        groups=groups,
        scores=scores,
        masks=masks,
        cost=facts["cost"],
        facts=facts["facts"],
        corrected=facts["corrected"],
        reconstruction=Reconstruction(**facts["reconstruction"]),
        allocation=facts["allocation"],
    )


def _mask_scores() -> Scores:
    """Read the scores that selected the first masks: rescored by the mask stage, else those of the score stage."""
    rescored = OUT / "mask" / SCORES
    return models.read_weights(rescored if rescored.exists() else OUT / "score" / SCORES)


def _write_cycle(cycle: Cycle, scores: Scores, model: nn.Module, before: float, after: float) -> dict[str, Any]:
    """Write a cycle to out/cycles/NN, given top-1 in percent before and after fine-tuning; return its `cycle_row`."""
    directory: Path = CYCLES / f"{cycle.number:02d}"
    models.save(model, directory)
    tables.write_table(summary_rows(cycle.groups, scores), tables.SCORES, directory / "scores.parquet")
    facts = {"cycle": cycle.number, "target": dict(cycle.target), "cost": dict(cycle.cost)}
    facts |= write_masks(directory, cycle.groups, cycle.masks)
    facts |= {"top1_before": before, "top1_after": after} | model_facts(model, directory)
    figures = {"rescoring": cycle.facts, "corrected": cycle.corrected, "allocation": cycle.allocation}
    figures |= {"reconstruction": cycle.reconstruction.facts}
    facts |= {name: dict(values) for name, values in figures.items() if values}
    write_json(directory / "metrics.json", facts)
    return cycle_row(cycle.number, cycle.groups, cycle.masks, facts)
