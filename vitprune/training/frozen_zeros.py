"""Keep pruned weights at zero in a training loop of the user."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures import find_groups
from vitprune.errors import BadInput
from vitprune.groups import Masks
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.wrappers import plain_model

RemovedWeights = Sequence[tuple[nn.Parameter, Tensor]]  # parameters with booleans, True for removed weights


@check_arguments()
@contextmanager
def freeze_zeros(
    model: nn.Module, *optimizers: Any, averages: Sequence[nn.Module] = (), masks: Masks | None = None
) -> Iterator[None]:
    """Keep the removed single weights of a model at zero in a training loop of your own.

    They are exactly zero after every step of any optimizer, and have no effect on gradient clipping: their gradients
    are zero. Averaged weights (EMA, SWA) keep the same zeros.

    Args:
        model: The pruned model, also inside torch.compile or data parallelism.
        optimizers: Every optimizer that changes its weights.
        averages: Models with averages of its weights, such as timm's ModelEmaV3 or torch's AveragedModel.
        masks: Masks by group name, as in `PruneResult.masks`; None: all prunable weights that are zero now.

    Yields:
        Nothing; the zeros are kept until the end of the `with` block.

    Raises:
        BadInput: there is no optimizer, or the single weights of the model cannot be pruned.

    Example:
        with vitprune.freeze_zeros(model, optimizer, averages=[ema]):
            for images, labels in loader:
                cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                ema.update(model)
    """
    if not optimizers or not all(callable(getattr(optimizer, "step", None)) for optimizer in optimizers):
        raise BadInput("freeze_zeros: give the model and every optimizer that changes its weights")
    plain = plain_model(model)
    removed = _removed_weights(plain, masks)
    names = {parameter: name for name, parameter in plain.named_parameters()}
    of_averages = [
        (plain_model(average).get_parameter(names[parameter]), zeros)
        for average in averages
        for parameter, zeros in removed
    ]
    set_removed_to_zero(removed + of_averages)
    hooks = [
        parameter.register_hook(lambda gradient, zeros=zeros: gradient.masked_fill(zeros, 0))  # type: ignore[no-untyped-call]
        for parameter, zeros in removed
        if parameter.requires_grad
    ]
    restore = [_set_zero_after(optimizer, removed) for optimizer in optimizers]
    try:
        yield
    finally:
        for undo in (*(hook.remove for hook in hooks), *restore):
            undo()
        set_removed_to_zero(removed + of_averages)


def _removed_weights(model: nn.Module, masks: Masks | None) -> list[tuple[nn.Parameter, Tensor]]:
    removed = []
    for group in find_groups(model, ["weight"]):
        parameter = model.get_parameter(group.name)
        if masks is None:
            zeros = parameter.detach() == 0
        elif group.name in masks and masks[group.name].numel() == parameter.numel():
            zeros = ~masks[group.name].bool().view_as(parameter).to(parameter.device)
        else:
            why = f"{group.name} has no mask of shape {list(parameter.shape)}"
            raise BadInput(f"masks: {why}; give the masks of `prune`")
        if bool(zeros.any()):
            removed.append((parameter, zeros))
    return removed


@torch.no_grad()
def set_removed_to_zero(removed: RemovedWeights) -> None:
    """Set the removed weights of parameters to zero."""
    for parameter, zeros in removed:
        parameter.masked_fill_(zeros, 0)


def _set_zero_after(optimizer: Any, removed: RemovedWeights) -> Callable[[], None]:
    """Set removed weights to zero after every step; return a function that ends this."""
    # the method is replaced, not hooked: timm's Lookahead runs no hooks of torch; a scheduler may replace it again
    step, active = optimizer.step, [True]

    def step_and_set_zero(self: Any, *args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        if active:
            set_removed_to_zero(removed)
        return result

    replaced = MethodType(step_and_set_zero, optimizer)
    optimizer.step = replaced

    def undo() -> None:
        active.clear()
        if optimizer.step is replaced:
            optimizer.step = step

    return undo
