"""Optimizers: parameter groups, learning rates, and optimizer state carried between pruning cycles."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

from vitprune.config.train_config import TrainConfig
from vitprune.errors import BadInput
from vitprune.groups import dense_name
from vitprune.training.lr_schedule import learning_rate

OptimizerState = dict[str, dict[str, Any]]  # name of a parameter in the dense model -> its optimizer state


@dataclass(frozen=True)
class ScheduleSpan:
    """Position of a training in a gradual run, over which the learning rate decays once.

    Attributes:
        before: Steps of earlier trainings.
        total: Steps of all trainings.
        memory: Optimizer state to start from, replaced in place by the final one; None to start without state.
        paths: Paths in the dense model by path, of modules that a removal of blocks has renamed.
    """

    before: int
    total: int
    memory: OptimizerState | None = None
    paths: Mapping[str, str] = field(default_factory=dict)


def make_optimizer(module: nn.Module, model: nn.Module, recipe: TrainConfig) -> Any:
    """Create the optimizer of a recipe.

    Args:
        module: Everything that is trained: the model and additional modules of the task.
        model: The model. With `layer_decay`, the learning rate of a layer is that fraction of the next layer's, in
            timm's numbering; additional modules have the full rate.
        recipe: The training settings.

    Returns:
        An optimizer of timm.

    Raises:
        BadInput: unknown optimizer, one that does not accept these settings, or all parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise BadInput(f"{type(model).__name__}: all parameters are frozen; call requires_grad_(True) before training")
    more: dict[str, Any] = {} if recipe.eps is None else {"eps": recipe.eps}
    if recipe.layer_decay is not None:
        more["param_group_fn"] = lambda module: _by_layer(module, model, recipe)
    try:
        return create_optimizer_v2(module, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **more)
    except (TypeError, ValueError) as error:
        why = f"timm cannot create it ({error})"
        raise BadInput(f"train.optimizer {recipe.optimizer!r}: {why}; use other settings") from None


def _by_layer(module: nn.Module, model: nn.Module, recipe: TrainConfig) -> list[dict[str, Any]]:
    no_decay: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay=recipe.weight_decay, no_weight_decay_list=no_decay(), layer_decay=recipe.layer_decay
    )
    in_model = set(model.parameters())
    for parameter in module.parameters():
        if parameter.requires_grad and parameter not in in_model:
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": 1.0})
    return groups


def learning_rates(recipe: TrainConfig, steps: int, span: ScheduleSpan | None) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, for `steps` steps per epoch."""
    run, warmup = span or ScheduleSpan(0, recipe.epochs * steps), round(recipe.warmup_epochs * steps)
    return lambda step: learning_rate(run.before + step, run.total, recipe.lr, recipe.min_lr, warmup, recipe.decay)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of every parameter group, scaled by the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


@contextmanager
def carry_optimizer_state(
    optimizer: Any, model: nn.Module, span: ScheduleSpan | None, masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Load optimizer state at the start and store the final state at the end.

    Args:
        optimizer: The optimizer.
        model: The model that is trained.
        span: Its `memory` is loaded and replaced in place by the final state; None for neither. The state of a
            parameter whose shape has changed is dropped.
        masks: Masks by parameter; the state of masked weights is set to zero.
    """
    if span is None or span.memory is None:
        yield
        return
    named = {dense_name(name, span.paths): (name, parameter) for name, parameter in model.named_parameters()}
    for key, (name, parameter) in named.items():
        state = span.memory.get(key, {})
        tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
        if not state or any(value.shape != parameter.shape for value in tensors):
            continue
        for value in tensors if name in masks else ():
            value.masked_fill_(~masks[name].view_as(value).to(value.device), 0)
        optimizer.state[parameter].update(state)
    yield
    span.memory.clear()
    span.memory.update({key: dict(optimizer.state[p]) for key, (_, p) in named.items() if p in optimizer.state})
