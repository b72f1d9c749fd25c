"""The one training loop, for dense training, recovery and distillation; pruned weights stay at zero."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.data import Mix, mixer
from vitprune.engine import Engine, engine, shared
from vitprune.errors import BadInput, NotFinite
from vitprune.families.dropping import stochastic_depth
from vitprune.groups import Group, Masks, zero
from vitprune.losses import CrossEntropy
from vitprune.params import Distill, Train
from vitprune.progress import track
from vitprune.schedule import rate
from vitprune.snapshot import Saving, Standing
from vitprune.team import ALONE, Team

Epochs = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # epoch -> its batches, the same each time it is asked
Memory = dict[str, dict[str, Any]]  # parameter -> what the optimizer remembers of it
Record = Callable[[dict[str, float]], None]
APART = 1_000_003  # between the seeds of two processes, whose random numbers are their own


@dataclass(frozen=True)
class Held:
    """Weights to hold at zero: their groups and masks."""

    groups: Sequence[Group]
    masks: Masks


@dataclass(frozen=True)
class Span:
    """Where a training stands in a gradual run: steps before it, steps of all cycles, and what the optimizer knew.

    The rate falls once over all the steps. `memory`, if there is one, is taken up and then replaced by what is known
    at the end.
    """

    before: int
    total: int
    memory: Memory | None = None


@dataclass
class _Counters:
    """Where a training stands: whole epochs and steps done, the losses of the epoch that runs, parts of a batch."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    parts: int = 1

    def noted(self) -> dict[str, Any]:
        return asdict(self) | {"done": len(self.losses)}


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
    task: nn.Module = LogitDistillationTask(
        student,
        teacher.eval().requires_grad_(False),
        CrossEntropy(smoothing),
        distill_loss_weight=alpha,
        task_loss_weight=1.0,
        temperature=temperature,
        verbose=False,
    )
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
        task: nn.Module = FeatureDistillationTask(
            student,
            teacher.eval().requires_grad_(False),
            CrossEntropy(smoothing),
            distill_loss_weight=alpha,
            task_loss_weight=1.0,
            dtype=next(student.parameters()).dtype,
            verbose=False,
        )
    return task


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
    held: Held | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    name: str = "training",
    span: Span | None = None,
    saving: Saving | None = None,
    mates: Team = ALONE,
) -> None:
    """Train the task's model in place, one record per epoch of `steps` batches.

    A fixed seed gives bit-identical weights on CPU. Records are of the weights that train, not of their average.
    Nothing that the optimizer remembers, and no norm that clips, knows of gradients of what is held. The learning rate
    falls over this training, or over the `span` that it is a part of. With `saving` it is kept while it runs, and goes
    on where that begins: of the epoch that was broken off, `epochs` gives the batches that are left then. Several
    processes take the steps of one: `epochs` gives each its share of a batch, or all of it where the recipe mixes.

    Raises:
        BadInput: an unknown optimizer, or nothing to train on.
        NotFinite: a loss or gradient that is not finite; the last step is not taken.
        Interrupted: it was kept because it was asked to stop.
    """
    model, pruned = task.trainable_module, task.get_eval_model()  # the task may train more than the model
    task = task.to(device := next(model.parameters()).device)
    optimizer, rate_at = _optimizer(model, recipe), _rates(recipe, steps, span)
    mix, hold = _mixer(task, recipe, generator := np.random.default_rng(seed), mates), _holder(pruned, held)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    kept = _remembering(optimizer, pruned, span.memory if span else None, held)
    dropping, averaging = stochastic_depth(pruned, recipe.drop_path), _averaging(pruned, recipe.ema)
    with forked, kept, dropping, averaging as average, engine(task, optimizer, recipe, device, mates) as motor:
        torch.manual_seed(seed + APART * mates.rank)
        standing = Standing(model, optimizer, average, generator, motor.scaler, mates)
        settle, at = _settler(pruned, average, held), _go_on(standing, saving, motor)
        for epoch in track(range(at.epoch, recipe.epochs), name, recipe.epochs, at.epoch):
            task.train()
            for images, labels in epochs(epoch):
                _set_rate(optimizer, rate_at(at.step))
                at.losses.append(_step(motor, mix(images.to(device), labels.to(device)), name, hold, at))
                at.step += 1
                settle(at.step)
                if saving is not None and saving.due():
                    saving.write(standing.taken(at.noted()))
            row = {"epoch": epoch + 1, "step": at.step, "loss": _mean(at.losses, name), "lr": rate_at(at.step - 1)}
            row |= {"micro_batches": at.parts} if at.parts != recipe.accumulate else {}  # memory did not suffice
            record(row | (evaluate() if evaluate is not None else {}))
            at.epoch, at.losses = epoch + 1, []


def _go_on(standing: Standing, saving: Saving | None, motor: Engine) -> _Counters:
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


def _settler(model: nn.Module, average: ModelEmaV3 | None, held: Held | None) -> Callable[[int], None]:
    """What is done after each step: zeros are zeros again, and the average moves."""

    def settle(step: int) -> None:
        if held is not None:
            zero(model, held.groups, held.masks)
        if average is not None:
            average.update(model, step)

    return settle


def _holder(model: nn.Module, held: Held | None) -> Callable[[], None]:
    """What is done to gradients before they count: those of held weights become zero.

    Else they would be in the norm that clips those of the others, and in what the optimizer remembers.
    """
    if held is None:
        return lambda: None
    pairs = []
    for group in held.groups:
        parameter = model.get_parameter(group.name)
        pairs.append((parameter, ~held.masks[group.name].view_as(parameter).to(parameter.device)))

    def hold() -> None:
        for parameter, gone in pairs:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    return hold


def _optimizer(model: nn.Module, recipe: Train) -> Any:
    more = {} if recipe.eps is None else {"eps": recipe.eps}
    try:
        return create_optimizer_v2(model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **more)
    except (TypeError, ValueError) as error:
        raise BadInput(f"train.optimizer {recipe.optimizer!r}: timm cannot make it ({error})") from None


@contextmanager
def _remembering(optimizer: Any, model: nn.Module, memory: Memory | None, held: Held | None) -> Iterator[None]:
    """Start from what the optimizer knew, but of what is held by now, and keep what it knows at the end.

    A parameter that has another shape by now starts anew.
    """
    named, masks = dict(model.named_parameters()), held.masks if held is not None else {}
    for name, known in (memory or {}).items():
        tensors = [value for value in known.values() if isinstance(value, Tensor) and value.dim()]
        if name not in named or any(value.shape != named[name].shape for value in tensors):
            continue
        for value in tensors if name in masks else ():
            value.masked_fill_(~masks[name].view_as(value).to(value.device), 0)
        optimizer.state[named[name]].update(known)
    yield
    if memory is not None:
        memory.clear()
        memory.update({name: dict(optimizer.state[p]) for name, p in named.items() if p in optimizer.state})


def _mean(losses: Sequence[float], name: str) -> float:
    if not losses:
        raise BadInput(f"{name}: there is no batch to train on; check the train split")
    return sum(losses) / len(losses)


def _rates(recipe: Train, steps: int, span: Span | None) -> Callable[[int], float]:
    """The learning rate of each step of a training of so many steps per epoch."""
    whole, warmup = span or Span(0, recipe.epochs * steps), round(recipe.warmup_epochs * steps)
    return lambda step: rate(whole.before + step, whole.total, recipe.lr, recipe.min_lr, warmup, recipe.decay)


def _set_rate(optimizer: Any, now: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now


def _mixer(task: Any, recipe: Train, generator: np.random.Generator, mates: Team) -> Mix:
    """What makes a process's share of a batch of what it is given; images mix over the whole batch."""
    if not recipe.mixes:
        return lambda images, labels: (images, labels)
    classes = int(task.get_eval_model().num_classes)
    mix = mixer(recipe.mixup, recipe.cutmix, recipe.mix_prob, classes, generator)
    return lambda images, labels: shared(*mix(images, labels), mates)


def _step(motor: Engine, batch: tuple[Tensor, Tensor], name: str, hold: Callable[[], None], at: _Counters) -> float:
    where = f"{name}, epoch {at.epoch + 1}, step {at.step + 1}"
    loss, norm = motor.step(*batch, hold, where)
    at.parts = motor.parts
    if not math.isfinite(loss):
        told = f"{where}: the loss is {loss}; lower the learning rate (lr) or check the images and the weights"
        raise NotFinite(told, at.epoch, len(at.losses))
    if not math.isfinite(norm):
        told = f"{where}: the gradient is {norm}; lower the learning rate (lr) or check the weights"
        raise NotFinite(told, at.epoch, len(at.losses))
    return loss
