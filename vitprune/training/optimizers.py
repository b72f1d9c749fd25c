"""The optimizer of a training: its groups and their rates, and what it knows from the training before."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

from vitprune.config.train_config import TrainConfig
from vitprune.errors import BadInput
from vitprune.training.lr_schedule import learning_rate

OptimizerState = dict[str, dict[str, Any]]  # parameter -> what the optimizer remembers of it


@dataclass(frozen=True)
class ScheduleSpan:
    """Where a training stands in a gradual run: steps before it, steps of all cycles, and what the optimizer knew.

    The rate falls once over all the steps. `memory`, if there is one, is taken up and then replaced by what is known
    at the end.
    """

    before: int
    total: int
    memory: OptimizerState | None = None


def make_optimizer(module: nn.Module, model: nn.Module, recipe: TrainConfig) -> Any:
    """The recipe's optimizer of all that trains: the model, and what a task trains beside it.

    With `layer_decay` the rate of a layer is that share of the rate of the layer above, as timm numbers them; what
    trains beside the model has the whole rate.

    Raises:
        BadInput: an unknown optimizer, or one that does not take these settings.
    """
    more: dict[str, Any] = {} if recipe.eps is None else {"eps": recipe.eps}
    if recipe.layer_decay is not None:
        more["param_group_fn"] = lambda module: _by_layer(module, model, recipe)
    try:
        return create_optimizer_v2(module, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, **more)
    except (TypeError, ValueError) as error:
        raise BadInput(f"train.optimizer {recipe.optimizer!r}: timm cannot make it ({error})") from None


def _by_layer(module: nn.Module, model: nn.Module, recipe: TrainConfig) -> list[dict[str, Any]]:
    spared: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay=recipe.weight_decay, no_weight_decay_list=spared(), layer_decay=recipe.layer_decay
    )
    own = set(model.parameters())
    for parameter in module.parameters():
        if parameter.requires_grad and parameter not in own:
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": 1.0})
    return groups


def learning_rates(recipe: TrainConfig, steps: int, span: ScheduleSpan | None) -> Callable[[int], float]:
    """The learning rate of each step of a training of so many steps per epoch."""
    whole, warmup = span or ScheduleSpan(0, recipe.epochs * steps), round(recipe.warmup_epochs * steps)
    return lambda step: learning_rate(whole.before + step, whole.total, recipe.lr, recipe.min_lr, warmup, recipe.decay)


def set_learning_rate(optimizer: Any, now: float) -> None:
    """Set the rate of every group to its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = now * group.get("lr_scale", 1.0)


@contextmanager
def carry_optimizer_state(
    optimizer: Any, model: nn.Module, memory: OptimizerState | None, masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Start from what the optimizer knew, but of what is held by now, and keep what it knows at the end.

    A parameter that has another shape by now starts anew.
    """
    named = dict(model.named_parameters())
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
