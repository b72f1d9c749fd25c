"""Training loop of dense training, fine-tuning and distillation, with pruned weights kept at zero."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.config.train_config import TrainConfig
from vitprune.data import MixFn, make_mixer
from vitprune.errors import BadInput, NotFinite
from vitprune.groups import Group, Masks, zero
from vitprune.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from vitprune.runtime.progress import track
from vitprune.training.checkpoint import Checkpointer, TrainingState
from vitprune.training.forward_options import forward_options, to_device
from vitprune.training.optimizers import (
    ScheduleSpan,
    carry_optimizer_state,
    learning_rates,
    make_optimizer,
    set_learning_rate,
)
from vitprune.training.step import TrainStep, local_share, make_train_step
from vitprune.training.stochastic_depth import stochastic_depth

EpochBatches = Callable[[int], Iterable[tuple[Tensor, ...]]]  # epoch -> its batches, the same at every call
Record = Callable[[dict[str, float]], None]
_MaskedParameter = tuple[nn.Parameter, Tensor]  # mask in the parameter's type, so that products are fast
SEED_STRIDE = 1_000_003  # between the seeds of two ranks


@dataclass(frozen=True)
class FrozenZeros:
    """Pruned weights that training keeps at zero: their groups and masks (False = zero)."""

    groups: Sequence[Group]
    masks: Masks


@dataclass
class _Counters:
    """Progress of a training: epochs and steps done, losses of the current epoch, micro-batches per batch."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    micro_batches: int = 1
    best: float | None = None  # highest top-1 so far
    since: int = 0  # epochs after it

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"done": len(self.losses)}

    def epochs_without_gain(self, top1: float) -> int:
        """Record the top-1 of an epoch and return the number of epochs since the best one."""
        better = self.best is None or top1 > self.best
        self.best, self.since = (top1, 0) if better else (self.best, self.since + 1)
        return self.since


def train(
    task: Any,
    epochs: EpochBatches,
    steps: int,
    recipe: TrainConfig,
    seed: int,
    record: Record,
    frozen_zeros: FrozenZeros | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    name: str = "training",
    span: ScheduleSpan | None = None,
    checkpointer: Checkpointer | None = None,
    dist: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Train the model of a task in place. On CPU, the same seed gives bit-identical weights.

    Frozen zeros have no effect on gradient clipping or on the optimizer state. With `recipe.patience`, training stops
    early, and the weights are those of the last epoch.

    Args:
        task: A task of timm.task or of `training.distillation`.
        epochs: Returns the batches of an epoch. Each process gets its own share of a batch, or the whole batch if the
            recipe mixes images. After a resume, the first epoch consists of the remaining batches.
        steps: Batches per epoch.
        recipe: The training settings.
        seed: Seed of Mixup, CutMix, dropout and stochastic depth.
        record: Called after each epoch with epoch, step, loss, lr and the result of `evaluate`. With EMA, `evaluate`
            still measures the training weights.
        frozen_zeros: Weights to keep at zero.
        evaluate: Evaluation after each epoch; `recipe.patience` needs its "top1".
        name: Name of the training in messages and in the progress bar.
        span: Position in a gradual run over which the learning rate decays; None for this training alone.
        checkpointer: Saves the training while it runs and holds the checkpoint to resume from.
        dist: The process group.

    Raises:
        BadInput: unknown optimizer, no batches, or an option that the model does not support.
        NotFinite: a loss or gradient is not finite; the last step is not applied.
        Interrupted: a checkpoint was saved after a stop request.
    """
    model, pruned = task.trainable_module, task.get_eval_model()  # the task may train more than the model
    task = task.to(device := next(model.parameters()).device)
    optimizer, rate_at = make_optimizer(model, pruned, recipe), learning_rates(recipe, steps, span)
    mix = _make_mix(task, recipe, generator := np.random.default_rng(seed), dist)
    pairs = _masked_parameters(pruned, frozen_zeros)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    masks = frozen_zeros.masks if frozen_zeros else {}
    carried = carry_optimizer_state(optimizer, pruned, span, masks)
    depth, ema = stochastic_depth(pruned, recipe.drop_path), _weight_average(pruned, recipe.ema)
    stepping, options = make_train_step(task, optimizer, recipe, device, dist), forward_options(task, recipe)
    with forked, carried, depth, options, ema as average, stepping as train_step:
        torch.manual_seed(seed + SEED_STRIDE * dist.rank)
        state = TrainingState(model, optimizer, average, generator, train_step.scaler, dist)
        counters = _resume(state, checkpointer, train_step)
        for epoch in track(range(counters.epoch, recipe.epochs), name, recipe.epochs, counters.epoch):
            task.train()
            for images, labels, *more in epochs(epoch):
                set_learning_rate(optimizer, rate_at(counters.step))
                batch = (*mix(to_device(images, device, recipe), labels.to(device)), *(x.to(device) for x in more))
                counters.losses.append(_step(train_step, batch, name, pairs, counters))
                counters.step += 1
                _after_step(pairs, pruned, average, counters.step)
                if checkpointer is not None and checkpointer.due():
                    checkpointer.write(state.capture(counters.to_dict()))
            row = _epoch_row(counters, recipe, rate_at, name)
            metrics = evaluate() if evaluate is not None else {}
            record(row | metrics)
            counters.epoch, counters.losses = epoch + 1, []
            if recipe.patience is not None and dist.broadcast(_stops_early(counters, metrics, recipe.patience, dist)):
                break


def _epoch_row(
    counters: _Counters, recipe: TrainConfig, rate_at: Callable[[int], float], name: str
) -> dict[str, float]:
    if not counters.losses:
        raise BadInput(f"{name}: there is no batch to train on; check the train split")
    step, loss = counters.step, sum(counters.losses) / len(counters.losses)
    row = {"epoch": counters.epoch + 1, "step": step, "loss": loss, "lr": rate_at(step - 1)}
    # a different number of micro-batches: memory did not suffice for the configured one
    return row | ({"micro_batches": counters.micro_batches} if counters.micro_batches != recipe.accumulate else {})


def _stops_early(counters: _Counters, metrics: Mapping[str, float], patience: int, dist: ProcessGroup) -> int:
    """Return 1 if rank 0, the only one that evaluates, has seen no better top-1 for `patience` epochs."""
    if dist.rank:
        return 0
    if "top1" not in metrics:
        raise BadInput("train.patience: top-1 is not evaluated after each epoch here; set it to null")
    return int(counters.epochs_without_gain(metrics["top1"]) >= patience)


def _resume(state: TrainingState, checkpointer: Checkpointer | None, train_step: TrainStep) -> _Counters:
    """Restore the checkpoint, if there is one."""
    if checkpointer is None or checkpointer.resumed_from is None:
        return _Counters(micro_batches=train_step.micro_batches)
    snapshot = checkpointer.resumed_from
    state.restore(snapshot)
    counters = _Counters(**{counter.name: snapshot.facts[counter.name] for counter in fields(_Counters)})
    train_step.micro_batches = counters.micro_batches
    return counters


@contextmanager
def _weight_average(model: nn.Module, decay: float) -> Iterator[ModelEmaV3 | None]:
    """The EMA of the weights, or None; the model gets the averaged weights at the end."""
    average = ModelEmaV3(model, decay, use_warmup=True) if decay else None
    yield average
    if average is not None:
        model.load_state_dict(average.module.state_dict())


@torch.no_grad()
def _after_step(pairs: Sequence[_MaskedParameter], model: nn.Module, average: ModelEmaV3 | None, step: int) -> None:
    """Reset frozen zeros after an optimizer step and update the EMA."""
    for parameter, mask in pairs:
        parameter.mul_(mask)
    if average is not None:
        average.update(model, step)


def _masked_parameters(model: nn.Module, frozen_zeros: FrozenZeros | None) -> list[_MaskedParameter]:
    """Zero the pruned weights and return their parameters with the masks on the parameters' device."""
    if frozen_zeros is None:
        return []
    zero(model, frozen_zeros.groups, frozen_zeros.masks)
    named = [(model.get_parameter(group.name), frozen_zeros.masks[group.name]) for group in frozen_zeros.groups]
    return [(parameter, mask.view_as(parameter).to(parameter)) for parameter, mask in named]


def _make_mix(task: Any, recipe: TrainConfig, generator: np.random.Generator, dist: ProcessGroup) -> MixFn:
    """Return a function that mixes the whole batch and returns this rank's share; without mixing, the identity."""
    if not recipe.mixes:
        return lambda images, labels: (images, labels)
    classes = int(task.get_eval_model().num_classes)
    mix = make_mixer(recipe.mixup, recipe.cutmix, recipe.mix_prob, classes, generator)
    return lambda images, labels: local_share(*mix(images, labels), dist)


def _step(
    train_step: TrainStep, batch: tuple[Tensor, ...], name: str, pairs: Sequence[_MaskedParameter], counters: _Counters
) -> float:
    where = f"{name}, epoch {counters.epoch + 1}, step {counters.step + 1}"

    def mask_gradients() -> None:  # before clipping and before the optimizer state see them
        for parameter, mask in pairs:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    loss, norm = train_step.step(batch, mask_gradients, where)
    counters.micro_batches = train_step.micro_batches
    for what, value, suspects in ("loss", loss, "the images and the weights"), ("gradient", norm, "the weights"):
        if not math.isfinite(value):
            line = f"{where}: the {what} is {value}; lower the learning rate (lr) or check {suspects}"
            raise NotFinite(line, counters.epoch, len(counters.losses))
    return loss
