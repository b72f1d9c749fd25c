"""What stages do with a project's images: open a split for a model, evaluate on it, train on it, recover on it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitprune import data
from vitprune.config.params import Params
from vitprune.config.train_config import Train
from vitprune.errors import BadInput, NotFinite
from vitprune.evaluation.accuracy import accuracy
from vitprune.pipeline.artifacts import History
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import Cycle
from vitprune.runtime import tables
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from vitprune.training import checkpoint_store
from vitprune.training.cached_teacher import CachedDistillationTask, cache_teacher, with_answers
from vitprune.training.checkpoint_store import CheckpointStore
from vitprune.training.loop import Epochs, FrozenZeros, classification, train
from vitprune.training.optimizers import OptimizerState, ScheduleSpan
from vitprune.training.saving import Checkpointer, stopping

MANIFEST, CALIBRATION = Path("data/manifest.parquet"), Path("data/calibration.parquet")
OUT, KEPT = Path("out"), Path(".vitprune/resume")  # the latter outside of what DVC empties before a stage
SECTIONS = {  # of params.yaml: what decides the result of a stage that is kept while it runs
    "dense": ("seed", "threads", "dataset", "model", "dense", "evaluate"),
    "prune": ("seed", "threads", "dataset", "score", "prune", "evaluate"),
    "distill": ("seed", "threads", "dataset", "prune", "distill", "evaluate"),
}
WORKERS = "VITPRUNE_WORKERS"
TOLD = 8  # ids of a bad batch that an error names
Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class RecoverySegment:
    """A cycle's training as part of a gradual run: all cycles' epochs, and what the optimizer knew before."""

    cycle: int
    epochs: list[int]
    memory: OptimizerState | None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"recovery after cycle {self.cycle}"

    def span(self, recipe: Train, steps: int) -> ScheduleSpan:
        """Its place among the steps of what the rate falls over, an epoch having so many."""
        if recipe.decay_over == "cycle":
            return ScheduleSpan(0, recipe.epochs * steps, self.memory)
        return ScheduleSpan(sum(self.epochs[: self.cycle - 1]) * steps, sum(self.epochs) * steps, self.memory)


@dataclass(frozen=True)
class StageCheckpoint:
    """Where a stage keeps what it has done so far, the key by which only the same work is taken up, and who does it."""

    directory: Path
    key: str
    dist: ProcessGroup = SINGLE_PROCESS

    def shelf(self, name: str, before: str = "", keep: int = 2) -> CheckpointStore:
        """Checkpoints of a part of the work; it goes on from something, of which `before` is the digest."""
        return CheckpointStore(self.directory / name, checkpoint_store.chained(self.key, name, before), keep)


@contextmanager
def stage_checkpoint(stage: str, params: Params, inputs: list[Path], dist: ProcessGroup) -> Iterator[StageCheckpoint]:
    """Where a stage keeps its work, whose files are `inputs`; empty again once the stage has ended well."""
    settings = {name: params.model_dump(mode="json")[name] for name in SECTIONS[stage]}
    key = checkpoint_store.key_of(stage, settings, inputs, device().type)
    yield StageCheckpoint(KEPT / f"{stage}-{key}", key, dist)
    for left in KEPT.glob(f"{stage}-*") if dist.rank == 0 else ():
        CheckpointStore(left, "").clear()


def device() -> torch.device:
    """VITPRUNE_DEVICE, or the process's own GPU where there is one: never a param, so that what is cached stays."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("VITPRUNE_DEVICE") or own)


def calibration(model: nn.Module, params: Params) -> list[data.Batch]:
    """The calibration images as a model takes them."""
    return data.load_calibration(CALIBRATION, data.transform(data.data_config(model)), params.score.batch_size)


def source_of(params: Params) -> data.Source:
    """The source of a project's images."""
    return data.open_source(params.dataset.source, params.dataset.classes, params.dataset.eval_source)


def open_images(split: str, model: nn.Module, params: Params, augment: str | None = None) -> data.ImageTable:
    """The train or eval images as a model takes them.

    Raises:
        BadInput: a label is none of the model's classes.
    """
    transform = data.transform(data.data_config(model), augment)
    table = data.open_split(tables.read(MANIFEST, tables.MANIFEST), source_of(params), split, transform)
    highest, classes = int(table.labels.max()), int(cast(int, model.num_classes))
    if highest >= classes:
        raise BadInput(f"model.args.num_classes: {classes}, but the data has label {highest}; set it to {highest + 1}")
    return table


def evaluate_model(model: nn.Module, params: Params) -> Evaluate:
    """What measures a model on the eval images, as it is by then."""
    return partial(make_evaluator(model, params), model)


def make_evaluator(dense: nn.Module, params: Params) -> Callable[[nn.Module], dict[str, float]]:
    """What measures any model that takes images as the dense one does, on the eval images."""
    table = open_images("eval", dense, params)
    return lambda model: accuracy(model, data.eval_batches(table, params.evaluate.batch_size))[0]


def train_model(
    task: Any,
    recipe: Train,
    params: Params,
    history: History,
    shelf: CheckpointStore,
    held: FrozenZeros | None = None,
    evaluate: Evaluate | None = None,
    part: RecoverySegment | None = None,
    dist: ProcessGroup = SINGLE_PROCESS,
    recalls: bool = False,
) -> None:
    """Train a task's model on the train images; what is on the shelf of the same training is gone on from.

    With `recalls` it is a task of distillation whose teacher is asked once, before all steps.

    Raises:
        BadInput: as of `train`; where a loss is not finite, it names the images.
        Interrupted: as of `train`.
    """
    table = open_images("train", task.get_eval_model(), params, recipe.augment)
    name, cycle = (f"{history.stage} training", None) if part is None else (part.name, part.cycle)
    seed = params.seed if cycle is None else params.seed + 1000 * cycle
    steps = data.batch_count(len(table), recipe.batch_size)
    span = part.span(recipe, steps) if part else None
    workers = data_workers()
    with stopping() as asked:
        saver = Checkpointer(shelf, lambda: history.rows, asked, dist)
        saver.reserve(task.trainable_module)
        begun = saver.begun.facts if saver.begun is not None else {"epoch": 0, "done": 0}
        if saver.begun is not None:
            history.restore(saver.rows)

        answers = None
        if recalls:
            answers = cache_teacher(task, params.distill, data.eval_batches(table, recipe.batch_size, workers), dist)
            task = CachedDistillationTask(task)
        batches = _epochs(table, recipe, seed, begun, dist, answers)
        add = partial(history.add, cycle=cycle)
        evaluate = evaluate if dist.rank == 0 else None
        try:
            train(task, batches, steps, recipe, seed, add, held, evaluate, name, span, saver, dist)
        except NotFinite as error:
            ids = data.batch_ids(table, recipe.batch_size, seed, error.epoch, error.number, recipe.repeats)
            raise BadInput(f"{error}; its images: {_listed(ids)}{saver.broadcast}") from None


def _epochs(
    table: data.ImageTable,
    recipe: Train,
    seed: int,
    begun: Mapping[str, int],
    dist: ProcessGroup,
    answers: Tensor | None,
) -> Epochs:
    """The batches of each epoch, of the first one those that are left; with the answers to its images, if there are."""
    workers, share = data_workers(), (0, 1) if recipe.mixes else (dist.rank, dist.size)
    size, repeats = recipe.batch_size, recipe.repeats

    def batches(epoch: int) -> Iterable[tuple[Tensor, ...]]:
        begin = begun["done"] if epoch == begun["epoch"] else 0
        found = data.train_batches(table, size, seed, epoch, workers, repeats, begin, share)
        if answers is None:
            return found
        return with_answers(found, answers, data.batch_rows(table, size, seed, epoch, repeats, begin, share))

    return batches


def data_workers() -> int:
    """Processes that decode training images, from the environment: they change no result; 0 is this process itself.

    Raises:
        BadInput: it is not a whole number of at least 0.
    """
    text = os.environ.get(WORKERS, "0")
    if not text.isdecimal():
        raise BadInput(f"{WORKERS}={text}: give the number of processes that decode images, 0 for none beside this one")
    return int(text)


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - TOLD} more" if len(ids) > TOLD else ""
    return ", ".join(ids[:TOLD]) + more


def finetune_cycle(
    model: nn.Module,
    cycle: Cycle,
    plan: Plan,
    params: Params,
    history: History,
    shelf: CheckpointStore,
    held: FrozenZeros | None,
    evaluate: Evaluate | None = None,
    memory: OptimizerState | None = None,
    dist: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Train a model that a cycle has pruned, as `prune.recover` says, for as long as its schedule says.

    What is `held` stays zero. `memory` is what the optimizer knew after the cycle before, where the recipe keeps it;
    give all cycles the same one.
    """
    recipe = params.prune.recover
    if recipe is None:
        return
    epochs = plan.epochs(recipe.epochs)
    own = recipe.model_copy(update={"epochs": epochs[cycle.number - 1]})
    part = RecoverySegment(cycle.number, epochs, memory if recipe.optimizer_state == "keep" else None)
    train_model(classification(model, recipe.smoothing), own, params, history, shelf, held, evaluate, part, dist)
