"""The one training loop, for dense training, recovery and distillation; pruned weights stay at zero."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.config.params import Distill
from vitprune.config.train_config import Train
from vitprune.data import Mix, mixer
from vitprune.errors import BadInput, NotFinite
from vitprune.evaluation.losses import CrossEntropy
from vitprune.groups import Group, Masks, zero
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from vitprune.runtime.progress import track
from vitprune.training.checkpoint import Saving, TrainingState
from vitprune.training.forward_options import forward_options, to_device
from vitprune.training.optimizers import ScheduleSpan, carry_optimizer_state, optimizer_for, rates, set_rate
from vitprune.training.step import TrainStep, make_train_step, shared
from vitprune.training.stochastic_depth import stochastic_depth

Epochs = Callable[[int], Iterable[tuple[Tensor, ...]]]  # epoch -> its batches, the same each time it is asked
Record = Callable[[dict[str, float]], None]
Pair = tuple[nn.Parameter, Tensor]  # and its mask, 0 where it is held at zero, in its own type: products are fast
APART = 1_000_003  # between the seeds of two processes, whose random numbers are their own


@dataclass(frozen=True)
class FrozenZeros:
    """Weights to hold at zero: their groups and masks."""

    groups: Sequence[Group]
    masks: Masks


@dataclass
class _Counters:
    """Where a training stands: whole epochs and steps done, the losses of the epoch that runs, parts of a batch.

    `best` is the highest top-1 after an epoch so far, and `since` the epochs that came after it.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    parts: int = 1
    best: float | None = None
    since: int = 0

    def noted(self) -> dict[str, Any]:
        return asdict(self) | {"done": len(self.losses)}

    def waited(self, top1: float) -> int:
        """Epochs without a better top-1, this one included."""
        better = self.best is None or top1 > self.best
        self.best, self.since = (top1, 0) if better else (self.best, self.since + 1)
        return self.since


def classification(model: nn.Module, smoothing: float = 0.0) -> nn.Module:
    """The task of cross-entropy on labels."""
    task: nn.Module = ClassificationTask(model, CrossEntropy(smoothing), verbose=False)
    return task


def distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, temperature: float, smoothing: float
) -> nn.Module:
    """The task of cross-entropy + alpha * KL(teacher || student) on softened logits.

    The divergence is summed over the positions of a sequence, if there are any, and averaged over the batch.

    Source: UP-ViTs equation 2.
    """
    task: nn.Module = LogitDistillationTask(**_taught(student, teacher, alpha, smoothing), temperature=temperature)
    return task


def feature_distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, smoothing: float, seed: int
) -> nn.Module:
    """The task of cross-entropy + alpha * mean squared error of the features before the head, pooled over positions.

    Where the student's features are fewer, a Linear layer drawn from the seed and trained with it maps them.

    Source: UP-ViTs' variant for PVTv2, as described by others (alpha 20); the letter itself does not give it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = _taught(student, teacher, alpha, smoothing)
        task: nn.Module = FeatureDistillationTask(**own, dtype=next(student.parameters()).dtype)
    return task


def _taught(student: nn.Module, teacher: nn.Module, alpha: float, smoothing: float) -> dict[str, Any]:
    """What both tasks take: who learns from whom, and how much labels and teacher count."""
    return {
        "student_model": student, "teacher_model": teacher.eval().requires_grad_(False), "verbose": False,
        "criterion": CrossEntropy(smoothing), "distill_loss_weight": alpha, "task_loss_weight": 1.0,
    }  # fmt: skip


def distilling(student: nn.Module, teacher: nn.Module, settings: Distill, smoothing: float, seed: int) -> nn.Module:
    """The task that the settings ask for."""
    if settings.kind == "features":
        return feature_distillation(student, teacher, settings.alpha, smoothing, seed)
    return distillation(student, teacher, settings.alpha, settings.temperature, smoothing)


def train(
    task: Any,
    epochs: Epochs,
    steps: int,
    recipe: Train,
    seed: int,
    record: Record,
    held: FrozenZeros | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    name: str = "training",
    span: ScheduleSpan | None = None,
    saving: Saving | None = None,
    dist: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Train the task's model in place, one record per epoch of `steps` batches.

    A fixed seed gives bit-identical weights on CPU. Records are of the weights that train, not of their average.
    Nothing that the optimizer remembers, and no norm that clips, knows of gradients of what is held. The learning rate
    falls over this training, or over the `span` that it is a part of. With `saving` it is kept while it runs, and goes
    on where that begins: of the epoch that was broken off, `epochs` gives the batches that are left then. Several
    processes take the steps of one: `epochs` gives each its share of a batch, or all of it where the recipe mixes.
    With `patience` it ends after so many epochs whose `evaluate` gave no better top-1 than one before; the weights are
    those of the last epoch all the same.

    Raises:
        BadInput: an unknown optimizer, nothing to train on, or the recipe asks for what the model cannot do.
        NotFinite: a loss or gradient that is not finite; the last step is not taken.
        Interrupted: it was kept because it was asked to stop.
    """
    model, pruned = task.trainable_module, task.get_eval_model()  # the task may train more than the model
    task = task.to(device := next(model.parameters()).device)
    optimizer, rate_at = optimizer_for(model, pruned, recipe), rates(recipe, steps, span)
    mix, pairs = _mixer(task, recipe, generator := np.random.default_rng(seed), dist), _pairs(pruned, held)
    hold = _holder(pairs)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    kept = carry_optimizer_state(optimizer, pruned, span.memory if span else None, held.masks if held else {})
    dropping, averaging = stochastic_depth(pruned, recipe.drop_path), _averaging(pruned, recipe.ema)
    running, arrangement = make_train_step(task, optimizer, recipe, device, dist), forward_options(task, recipe)
    with forked, kept, dropping, arrangement, averaging as average, running as motor:
        torch.manual_seed(seed + APART * dist.rank)
        standing = TrainingState(model, optimizer, average, generator, motor.scaler, dist)
        settle, at = _settler(pairs, pruned, average), _go_on(standing, saving, motor)
        for epoch in track(range(at.epoch, recipe.epochs), name, recipe.epochs, at.epoch):
            task.train()
            for images, labels, *more in epochs(epoch):
                set_rate(optimizer, rate_at(at.step))
                batch = mix(to_device(images, device, recipe), labels.to(device))
                at.losses.append(_step(motor, (*batch, *(given.to(device) for given in more)), name, hold, at))
                at.step += 1
                settle(at.step)
                if saving is not None and saving.due():
                    saving.write(standing.taken(at.noted()))
            row = {"epoch": epoch + 1, "step": at.step, "loss": _mean(at.losses, name), "lr": rate_at(at.step - 1)}
            row |= {"micro_batches": at.parts} if at.parts != recipe.accumulate else {}  # memory did not suffice
            measured = evaluate() if evaluate is not None else {}
            record(row | measured)
            at.epoch, at.losses = epoch + 1, []
            if recipe.patience is not None and dist.broadcast(_enough(at, measured, recipe.patience, dist)):
                break


def _enough(at: _Counters, measured: Mapping[str, float], patience: int, dist: ProcessGroup) -> int:
    """Whether the first process has waited long enough; only it measures."""
    if dist.rank:
        return 0
    if "top1" not in measured:
        raise BadInput("train.patience: nothing measures top-1 after an epoch here; set it to null")
    return int(at.waited(measured["top1"]) >= patience)


def _go_on(standing: TrainingState, saving: Saving | None, motor: TrainStep) -> _Counters:
    """Start anew, or where the training was broken off."""
    if saving is None or saving.begun is None:
        return _Counters(parts=motor.parts)
    standing.put_back(saving.begun)
    at = _Counters(**{counter.name: saving.begun.facts[counter.name] for counter in fields(_Counters)})
    motor.parts = at.parts
    return at


@contextmanager
def _averaging(model: nn.Module, decay: float) -> Iterator[ModelEmaV3 | None]:
    """The average of the weights, if there is to be one; the model ends with it."""
    average = ModelEmaV3(model, decay, use_warmup=True) if decay else None
    yield average
    if average is not None:
        model.load_state_dict(average.module.state_dict())


def _settler(pairs: Sequence[Pair], model: nn.Module, average: ModelEmaV3 | None) -> Callable[[int], None]:
    """What is done after each step: zeros are zeros again, and the average moves."""

    @torch.no_grad()
    def settle(step: int) -> None:
        for parameter, mask in pairs:
            parameter.mul_(mask)
        if average is not None:
            average.update(model, step)

    return settle


def _pairs(model: nn.Module, held: FrozenZeros | None) -> list[Pair]:
    """Each parameter of which something is held at zero, and its mask: on its device, since every step asks for it.

    Raises:
        BadInput: a mask does not fit the model.
    """
    if held is None:
        return []
    zero(model, held.groups, held.masks)
    named = [(model.get_parameter(group.name), held.masks[group.name]) for group in held.groups]
    return [(parameter, mask.view_as(parameter).to(parameter)) for parameter, mask in named]


def _holder(pairs: Sequence[Pair]) -> Callable[[], None]:
    """What is done to gradients before they count: those of held weights become zero.

    Else they would be in the norm that clips those of the others, and in what the optimizer remembers.
    """

    def hold() -> None:
        for parameter, mask in pairs:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    return hold


def _mean(losses: Sequence[float], name: str) -> float:
    if not losses:
        raise BadInput(f"{name}: there is no batch to train on; check the train split")
    return sum(losses) / len(losses)


def _mixer(task: Any, recipe: Train, generator: np.random.Generator, dist: ProcessGroup) -> Mix:
    """What makes a process's share of a batch of what it is given; images mix over the whole batch."""
    if not recipe.mixes:
        return lambda images, labels: (images, labels)
    classes = int(task.get_eval_model().num_classes)
    mix = mixer(recipe.mixup, recipe.cutmix, recipe.mix_prob, classes, generator)
    return lambda images, labels: shared(*mix(images, labels), dist)


def _step(motor: TrainStep, batch: tuple[Tensor, ...], name: str, hold: Callable[[], None], at: _Counters) -> float:
    where = f"{name}, epoch {at.epoch + 1}, step {at.step + 1}"
    loss, norm = motor.step(batch, hold, where)
    at.parts = motor.parts
    if not math.isfinite(loss):
        broadcast = f"{where}: the loss is {loss}; lower the learning rate (lr) or check the images and the weights"
        raise NotFinite(broadcast, at.epoch, len(at.losses))
    if not math.isfinite(norm):
        broadcast = f"{where}: the gradient is {norm}; lower the learning rate (lr) or check the weights"
        raise NotFinite(broadcast, at.epoch, len(at.losses))
    return loss
