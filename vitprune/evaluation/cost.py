"""Parameters and multiply-accumulate operations (MACs) of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitprune.architectures import find_groups
from vitprune.data.batch_checks import checked_input
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import eval_mode, frozen, unfused_attention
from vitprune.runtime.wrappers import plain_model


@dataclass(frozen=True)
class Counts:
    """Parameters of a model and multiply-accumulate operations (MACs) per image.

    Attributes:
        params: Parameters.
        nonzero_params: Nonzero parameters.
        macs: MACs.
        nonzero_macs: MACs, with each layer's scaled by its own share of nonzero weights.
        nominal_macs: MACs, with each prunable layer's scaled by the mean share of nonzero weights of all prunable
            layers. Source: DIMAP, table 1.
    """

    params: int
    nonzero_params: int
    macs: int
    nonzero_macs: int
    nominal_macs: int


@check_arguments()
def count(model: nn.Module, example_input: Tensor) -> Counts:
    """Count the parameters of a model and its MACs for one image.

    MACs are half the FLOPs of matrix products, convolutions and attention. Fused attention is disabled while counting,
    because the FLOP counter misses part of it on CPU.

    Args:
        model: The model.
        example_input: Images (B, C, H, W), of which the first is used.

    Returns:
        The counts.

    Raises:
        BadInput: the model does not run on the input.
    """
    model = plain_model(model)
    total, per_layer = count_macs(model, checked_input("example_input", example_input, model)[:1])
    weights = {name: model.get_parameter(f"{name}.weight") for name in per_layer}
    zeros = {name: 1 - int(weight.count_nonzero()) / weight.numel() for name, weight in weights.items()}
    parameters = list(model.parameters())
    return Counts(
        params=sum(p.numel() for p in parameters),
        nonzero_params=sum(int(p.count_nonzero()) for p in parameters),
        macs=total,
        nonzero_macs=total - round(sum(macs * zeros[name] for name, macs in per_layer.items())),
        nominal_macs=total - _nominal_saving(model, per_layer),
    )


def group_costs(model: nn.Module, groups: Sequence[Group], example_input: Tensor) -> dict[str, tuple[int, int]]:
    """Return the weights and the MACs per image of the layers that each group prunes.

    Args:
        model: The model.
        groups: Groups of its units.
        example_input: Images (B, C, H, W), of which the first is used.

    Returns:
        By group name: number of weights removed with the whole group, and MACs of the layers that it prunes.
    """
    per_layer = count_macs(model, example_input[:1])[1]
    costs = {}
    for group in groups:
        inner = {path for paths in group.sublayers for path in paths}
        names = dict.fromkeys(part.param for part in group.slices)
        names |= dict.fromkeys(name for name, _ in model.named_parameters() if is_within(name, inner))
        weights = sum(model.get_parameter(name).numel() for name in names)
        costs[group.name] = weights, sum(per_layer.get(name.removesuffix(".weight"), 0) for name in names)
    return costs


def count_macs(model: nn.Module, image: Tensor) -> tuple[int, dict[str, int]]:
    """Return the MACs of the whole model, and of each Linear and Conv2d layer by name.

    Args:
        model: The model.
        image: Input (1, C, H, W), or tokens.
    """
    layers, weight = _Layers(model), next(model.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), eval_mode(model), frozen(model), unfused_attention(model), counter, layers:
        model(image.to(weight) if image.is_floating_point() else image.to(weight.device))  # tokens remain integers
    return int(counter.get_total_flops() // 2), layers.macs


def _nominal_saving(model: nn.Module, per_layer: dict[str, int]) -> int:
    """Return the MACs saved if every prunable layer had the mean sparsity of all prunable layers."""
    try:
        groups = find_groups(model, ["weight"])
    except BadInput:  # no prunable layers
        return 0
    weights = [model.get_parameter(group.name) for group in groups]
    zeros = sum(w.numel() - int(w.count_nonzero()) for w in weights)
    prunable = sum(per_layer.get(group.name.removesuffix(".weight"), 0) for group in groups)
    return round(prunable * zeros / sum(w.numel() for w in weights))


class _Layers(TorchFunctionMode):
    """Count MACs per weight at F.linear and F.conv2d: some timm attentions use a layer's weight without calling it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        self.names = {id(layer.weight): name for name, layer in layers}
        self.macs: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            weight = kwargs["weight"] if kwargs and "weight" in kwargs else args[1]
            name = self.names.get(id(weight))
            if name is not None:  # each weight of an output channel is used once per output position
                used = output.numel() // weight.shape[0] * weight.numel()
                self.macs[name] = self.macs.get(name, 0) + used
        return output
