"""The one training loop, for dense training, recovery and distillation; pruned weights stay at zero."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.data import Mix, mixer
from vitprune.errors import BadInput
from vitprune.families.dropping import stochastic_depth
from vitprune.groups import Group, Masks, zero
from vitprune.losses import CrossEntropy
from vitprune.params import Distill, Train
from vitprune.progress import track
from vitprune.schedule import rate

Epochs = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # epoch -> its batches, the same each time it is asked
Memory = dict[str, dict[str, Any]]  # parameter -> what the optimizer remembers of it
Record = Callable[[dict[str, float]], None]


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
) -> None:
    """Train the task's model in place, one record per epoch of `steps` batches.

    A fixed seed gives bit-identical weights on CPU. Records are of the weights that train, not of their average.
    Nothing that the optimizer remembers, and no norm that clips, knows of gradients of what is held. The learning rate
    falls over this training, or over the `span` that it is a part of.

    Raises:
        BadInput: an unknown optimizer, nothing to train on, or a loss that is not finite; the last step is not taken.
    """
    model, pruned = task.trainable_module, task.get_eval_model()  # the task may train more than the model
    task = task.to(device := next(model.parameters()).device)
    optimizer, rate_at = _optimizer(model, recipe), _rates(recipe, steps, span)
    mix, hold, step = _mixer(task, recipe, seed), _holder(pruned, held), 0
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    kept = _remembering(optimizer, pruned, span.memory if span else None, held)
    with forked, kept, stochastic_depth(pruned, recipe.drop_path), _settling(pruned, recipe.ema, held) as settle:
        torch.manual_seed(seed)
        for epoch in track(range(recipe.epochs), name):
            task.train()
            losses = []
            for images, labels in epochs(epoch):
                _set_rate(optimizer, now := rate_at(step))
                batch, where = mix(images.to(device), labels.to(device)), f"{name}, epoch {epoch + 1}, step {step + 1}"
                losses.append(_step(task, optimizer, batch, recipe, where, hold))
                step += 1
                settle(step)
            row = {"epoch": epoch + 1, "step": step, "loss": _mean(losses, name), "lr": now}
            record(row | (evaluate() if evaluate is not None else {}))


@contextmanager
def _settling(model: nn.Module, decay: float, held: Held | None) -> Iterator[Callable[[int], None]]:
    """What is done after each step: zeros are zeros again, and the average moves; the model ends with the average."""
    average = ModelEmaV3(model, decay, use_warmup=True) if decay else None

    def settle(step: int) -> None:
        if held is not None:
            zero(model, held.groups, held.masks)
        if average is not None:
            average.update(model, step)

    yield settle
    if average is not None:
        model.load_state_dict(average.module.state_dict())


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


def _mixer(task: Any, recipe: Train, seed: int) -> Mix:
    if not recipe.mixup and not recipe.cutmix:
        return lambda images, labels: (images, labels)
    classes = int(task.get_eval_model().num_classes)
    return mixer(recipe.mixup, recipe.cutmix, recipe.mix_prob, classes, seed)


def _step(
    task: Any, optimizer: Any, batch: tuple[Tensor, Tensor], recipe: Train, where: str, hold: Callable[[], None]
) -> float:
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=recipe.amp):
        loss = task(*batch)["loss"]
    value = float(loss.detach())
    if not math.isfinite(value):
        raise BadInput(
            f"{where}: the loss is {value}; lower the learning rate (lr) or check the images and the weights"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    hold()
    norm = float(
        nn.utils.clip_grad_norm_(task.trainable_module.parameters(), math.inf if recipe.clip is None else recipe.clip)
    )
    if not math.isfinite(norm):
        raise BadInput(f"{where}: the gradient is {norm}; lower the learning rate (lr) or check the weights")
    optimizer.step()
    return value
