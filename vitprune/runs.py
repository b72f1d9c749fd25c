"""What stages do with a project's images: open a split for a model, evaluate on it, train on it, recover on it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from vitprune import data, tables
from vitprune.compress import Cycle
from vitprune.errors import BadInput
from vitprune.evaluate import accuracy
from vitprune.params import Params, Train
from vitprune.plans import Plan
from vitprune.records import History
from vitprune.train import Held, Memory, Span, classification, train

MANIFEST, CALIBRATION = Path("data/manifest.parquet"), Path("data/calibration.parquet")
Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Part:
    """A cycle's training as part of a gradual run: all cycles' epochs, and what the optimizer knew before."""

    cycle: int
    epochs: list[int]
    memory: Memory | None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"recovery after cycle {self.cycle}"

    def span(self, recipe: Train, steps: int) -> Span:
        """Its place among the steps of what the rate falls over, an epoch having so many."""
        if recipe.decay_over == "cycle":
            return Span(0, recipe.epochs * steps, self.memory)
        return Span(sum(self.epochs[: self.cycle - 1]) * steps, sum(self.epochs) * steps, self.memory)


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


def evaluator(model: nn.Module, params: Params) -> Evaluate:
    """What measures a model on the eval images, as it is by then."""
    table = open_images("eval", model, params)
    return lambda: accuracy(model, data.eval_batches(table, params.evaluate.batch_size))[0]


def fit(
    task: Any,
    recipe: Train,
    params: Params,
    history: History,
    held: Held | None = None,
    evaluate: Evaluate | None = None,
    part: Part | None = None,
) -> None:
    """Train a task's model on the train images."""
    table = open_images("train", task.get_eval_model(), params, recipe.augment)
    name, cycle = (f"{history.stage} training", None) if part is None else (part.name, part.cycle)
    seed = params.seed if cycle is None else params.seed + 1000 * cycle
    batches = partial(data.train_batches, table, recipe.batch_size, seed, repeats=recipe.repeats)
    steps = data.batch_count(len(table), recipe.batch_size)
    span = part.span(recipe, steps) if part else None
    train(task, batches, steps, recipe, seed, partial(history.add, cycle=cycle), held, evaluate, name, span)


def recover(
    model: nn.Module,
    cycle: Cycle,
    plan: Plan,
    params: Params,
    history: History,
    evaluate: Evaluate | None = None,
    memory: Memory | None = None,
) -> None:
    """Train a model that a cycle has pruned, as `prune.recover` says, for as long as its schedule says; zeros stay.

    `memory` is what the optimizer knew after the cycle before, where the recipe keeps it; give all cycles the same one.
    """
    recipe = params.prune.recover
    if recipe is None:
        return
    epochs = plan.epochs(recipe.epochs)
    own = recipe.model_copy(update={"epochs": epochs[cycle.number - 1]})
    held = Held(cycle.held, cycle.masks) if cycle.held else None
    part = Part(cycle.number, epochs, memory if recipe.optimizer_state == "keep" else None)
    fit(classification(model, recipe.smoothing), own, params, history, held, evaluate, part)
