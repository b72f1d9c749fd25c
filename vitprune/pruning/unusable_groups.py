"""Groups that a method cannot score from images, such as those without an effect on the output."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vitprune.config.prune_config import HEAD_CHANNELS
from vitprune.criteria import magnitude
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.pruning.methods import Method
from vitprune.runtime.eval_mode import eval_mode, scoring_mode
from vitprune.runtime.hooks import forward_hooks
from vitprune.runtime.messages import first_line
from vitprune.runtime.outputs import as_logits

UNITS = ("ffn", "head", *HEAD_CHANNELS)
DATA_FREE = (magnitude.random, magnitude.magnitude, magnitude.energy)


def scorable_groups(model: nn.Module, groups: Sequence[Group], method: Method) -> list[Group]:
    """Return the groups without those that `Method.check_group` refuses, such as convolutions for `unit-obs`.

    Args:
        model: The model.
        groups: Groups of its units.
        method: The method.

    Raises:
        BadInput: all groups of a kind are refused.
    """
    refused = _refused(model, groups, method)
    return [group for group in groups if group.name not in refused]


def unusable_groups(model: nn.Module, groups: Sequence[Group], images: Tensor, method: Method) -> dict[str, str]:
    """Return the groups that a method cannot score in a model, each with the reason.

    A criterion that measures the output of the model cannot score units that do not affect it, such as those of a
    pooling layer beside the features that count. Others are those that `Method.check_group` refuses.

    Args:
        model: The model; it is not changed.
        groups: Groups of its units.
        images: Calibration images (B, C, H, W).
        method: The method.

    Raises:
        BadInput: all groups of a kind are refused, or the forward pass has no gradients.
    """
    refused = _refused(model, groups, method)
    reasons = {} if method.criterion in DATA_FREE else _without_effect(model, groups, images)
    for name, why in refused.items():
        reasons[name] = why.partition(";")[0].removeprefix(f"{name}: ")
    return {name: f"{name}: {why}; it is not pruned" for name, why in reasons.items()}


def _refused(model: nn.Module, groups: Sequence[Group], method: Method) -> dict[str, str]:
    """Return the groups that the method's check refuses, with the reason; raise the first one if it refuses a kind."""
    result = {}
    for group in groups:
        try:
            if method.check_group is not None:
                method.check_group(model, group)
        except BadInput as error:
            result[group.name] = str(error)
    for kind in dict.fromkeys(group.kind for group in groups):
        reasons = [result.get(group.name, "") for group in groups if group.kind == kind]
        if all(reasons):
            raise BadInput(reasons[0])
    return result


def _without_effect(model: nn.Module, groups: Sequence[Group], images: Tensor) -> dict[str, str]:
    with scoring_mode(model), eval_mode(model):
        pair = images[:1].repeat(2, *[1] * (images.dim() - 1)).to(next(model.parameters()).device)
        with torch.no_grad(), _recorded_input_sizes(model) as of_one:
            model(pair[:1])
        with _recorded_input_sizes(model) as of_two:
            affecting = _parameters_with_gradients(model, pair)
    result = {}
    for group in groups:
        is_weight = group.kind == "weight"
        readers = [part.param.rpartition(".")[0] for part in group.slices if part.axis == 1 or is_weight]
        if group.kind in (*UNITS, "weight") and not {part.param for part in group.slices} & affecting:
            result[group.name] = "it does not affect the output that counts"
        elif group.kind in (*UNITS, "weight") and any(of_two.get(path, 1) == of_one.get(path, 0) for path in readers):
            result[group.name] = "its inputs are not those of images"
    return result


@contextmanager
def _recorded_input_sizes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Record the number of values that every layer reads, by path."""
    sizes: dict[str, int] = {}

    def record(path: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            sizes[path] = inputs[0].numel()

    with forward_hooks((module, partial(record, path)) for path, module in model.named_modules()):
        yield sizes


def _parameters_with_gradients(model: nn.Module, images: Tensor) -> set[str]:
    """Return the names of the parameters that affect the output."""
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    fixed = [value for value in parameters.values() if not value.requires_grad]
    for value in fixed:
        value.requires_grad_(True)
    try:
        output = as_logits(model(images))
        grads = torch.autograd.grad(output.square().sum(), list(parameters.values()), allow_unused=True)
    except RuntimeError as error:  # in a forward pass of another library, such as one that overwrites its activations
        why = f"its gradients cannot be computed ({first_line(error)})"
        raise BadInput(f"{type(model).__name__}: {why}; use channel-magnitude or dimap") from None
    finally:
        for value in fixed:
            value.requires_grad_(False)
    return {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}
