"""Train and evaluate a model inside a stage; an interrupted training resumes from its last checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune import data
from vitprune.config.params import Params
from vitprune.config.train_config import TrainConfig
from vitprune.errors import BadInput, NotFinite
from vitprune.evaluation.accuracy import accuracy
from vitprune.pipeline.artifacts import History
from vitprune.pipeline.project_data import data_workers, device, labeled_by_output, open_images
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from vitprune.training import checkpoint_store
from vitprune.training.cached_teacher import CachedDistillationTask, cache_teacher, with_teacher_outputs
from vitprune.training.checkpoint import Checkpointer, catch_stop_signals
from vitprune.training.checkpoint_store import CheckpointStore
from vitprune.training.finetune import SEED_STEP, RecoverySegment
from vitprune.training.loop import EpochBatches, FrozenZeros, train

RESUME = Path(".vitprune/resume")  # DVC empties the outputs of a stage before it runs, not this directory
SECTIONS = {  # sections of params.yaml that a resumable stage depends on
    "dense": ("seed", "threads", "dataset", "model", "dense", "evaluate"),
    "prune": ("seed", "threads", "dataset", "score", "prune", "evaluate"),
    "distill": ("seed", "threads", "dataset", "distill", "evaluate"),
}
MAX_LISTED = 8  # image ids of a bad batch that an error message lists
Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class StageCheckpoint:
    """Checkpoints of one stage.

    Attributes:
        directory: Directory of the checkpoints.
        key: Digest of the stage's inputs and settings; checkpoints of another key are ignored.
        dist: Process group of the stage.
    """

    directory: Path
    key: str
    dist: ProcessGroup = SINGLE_PROCESS

    def store(self, name: str, parent: str = "", keep: int = 2) -> CheckpointStore:
        """Return the checkpoint store of one part of the stage.

        Args:
            name: Name of the part.
            parent: SHA-256 of the checkpoint that the part starts from; empty if it starts from the stage's inputs.
            keep: Number of checkpoints to keep.
        """
        return CheckpointStore(self.directory / name, checkpoint_store.hash_strings(self.key, name, parent), keep)


@contextmanager
def stage_checkpoint(stage: str, params: Params, inputs: list[Path], dist: ProcessGroup) -> Iterator[StageCheckpoint]:
    """Yield the checkpoints of a stage; delete them when the stage has succeeded.

    Args:
        stage: Name of the stage.
        params: The project's params.yaml.
        inputs: Files and directories that the stage reads.
        dist: Process group of the stage.
    """
    settings = {name: params.model_dump(mode="json")[name] for name in SECTIONS[stage]}
    key = checkpoint_store.work_key(stage, settings, inputs, device().type)
    yield StageCheckpoint(RESUME / f"{stage}-{key}", key, dist)
    for directory in RESUME.glob(f"{stage}-*") if dist.rank == 0 else ():
        CheckpointStore(directory, "").clear()


def evaluate_model(model: nn.Module, params: Params) -> Evaluate:
    """Return a function that evaluates the model, in its state at the time of the call, on the eval split."""
    return partial(make_evaluator(model, params), model)


def make_evaluator(dense: nn.Module, params: Params) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that evaluates any model with the preprocessing of the dense model on the eval split."""
    table = open_images("eval", dense, params)
    return lambda model: accuracy(model, data.eval_batches(table, params.evaluate.batch_size))[0]


def train_model(
    task: Any,
    recipe: TrainConfig,
    params: Params,
    history: History,
    store: CheckpointStore,
    frozen_zeros: FrozenZeros | None = None,
    evaluate: Evaluate | None = None,
    segment: RecoverySegment | None = None,
    dist: ProcessGroup = SINGLE_PROCESS,
    cache_outputs: bool = False,
) -> None:
    """Train the model of a task on the train split, from the newest checkpoint of the store if there is one.

    Args:
        task: timm training task.
        recipe: Training settings.
        params: The project's params.yaml.
        history: Training curve to append to.
        store: Checkpoints of this training.
        frozen_zeros: Weights to keep at zero.
        evaluate: Evaluation after every epoch, run by rank 0; None for none.
        segment: Position in a gradual run; None for a training of its own.
        dist: Process group.
        cache_outputs: For distillation: compute the teacher's outputs once per image, before the first step.

    Raises:
        BadInput: as `train`; a loss that is not finite names the images of its batch.
        Interrupted: as `train`.
    """
    model = task.get_eval_model()
    table = labeled_by_output(open_images("train", model, params, recipe.augment), model)
    name, cycle = (f"{history.stage} training", None) if segment is None else (segment.name, segment.cycle)
    seed = params.seed if cycle is None else params.seed + SEED_STEP * cycle
    steps = data.batch_count(len(table), recipe.batch_size)
    span = segment.span(recipe, steps) if segment else None
    with catch_stop_signals() as stop_requested:
        saver = Checkpointer(store, lambda: history.rows, stop_requested, dist)
        saver.check_disk_space(task.trainable_module)
        start = {"epoch": 0, "done": 0}
        if saver.resumed_from is not None:
            start = saver.resumed_from.facts
            history.restore(saver.history_rows)
        outputs = None
        if cache_outputs:
            batches = data.eval_batches(table, recipe.batch_size, data_workers())
            outputs = cache_teacher(task, params.distill, batches, dist)
            task = CachedDistillationTask(task)
        epochs = _epochs(table, recipe, seed, start, dist, outputs)
        add = partial(history.add, cycle=cycle)
        evaluate = evaluate if dist.rank == 0 else None
        try:
            train(task, epochs, steps, recipe, seed, add, frozen_zeros, evaluate, name, span, saver, dist)
        except NotFinite as error:
            ids = data.batch_ids(table, recipe.batch_size, seed, error.epoch, error.number, recipe.repeats)
            raise BadInput(f"{error}; its images: {_listed(ids)}{saver.last_checkpoint_note}") from None


def _epochs(
    table: data.ImageTable,
    recipe: TrainConfig,
    seed: int,
    start: Mapping[str, int],
    dist: ProcessGroup,
    outputs: Tensor | None,
) -> EpochBatches:
    """Return the batches of each epoch, without those done before `start`, with cached teacher outputs if given."""
    workers, share = data_workers(), (0, 1) if recipe.mixes else (dist.rank, dist.size)
    size, repeats = recipe.batch_size, recipe.repeats

    def batches(epoch: int) -> Iterable[tuple[Tensor, ...]]:
        first = start["done"] if epoch == start["epoch"] else 0
        images = data.train_batches(table, size, seed, epoch, workers, repeats, first, share)
        if outputs is None:
            return images
        return with_teacher_outputs(images, outputs, data.batch_rows(table, size, seed, epoch, repeats, first, share))

    return batches


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - MAX_LISTED} more" if len(ids) > MAX_LISTED else ""
    return ", ".join(ids[:MAX_LISTED]) + more
