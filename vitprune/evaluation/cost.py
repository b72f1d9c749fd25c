"""Parameters and multiply-accumulate operations (MACs) of a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitprune.architectures import find_groups
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within
from vitprune.runtime.eval_mode import eval_mode, frozen


@dataclass(frozen=True)
class Counts:
    """Cost of one image. `nominal_macs` spreads the zeros evenly over the prunable layers, as DIMAP's paper does;
    `nonzero_macs` counts each layer's own.
    """

    params: int
    nonzero_params: int
    macs: int
    nonzero_macs: int
    nominal_macs: int


def count(model: nn.Module, example_input: Tensor) -> Counts:
    """Parameters and multiply-accumulates of one image; `example_input` (B, C, H, W) gives its size.

    MACs are half the FLOPs of matrix products, convolutions and attention, counted with fused attention off (it
    is under-counted on CPU otherwise).
    """
    total, per_layer = count_macs(model, example_input[:1])
    zeros = {name: _zero_share(model.get_parameter(f"{name}.weight")) for name in per_layer}
    parameters = list(model.parameters())
    return Counts(
        params=sum(p.numel() for p in parameters),
        nonzero_params=sum(int(p.count_nonzero()) for p in parameters),
        macs=total,
        nonzero_macs=total - round(sum(macs * zeros[name] for name, macs in per_layer.items())),
        nominal_macs=total - _nominal_saving(model, per_layer),
    )


def group_costs(model: nn.Module, groups: Sequence[Group], example_input: Tensor) -> dict[str, tuple[int, int]]:
    """Per group: the weights that go if all of it goes, and the MACs of one image in the layers that it cuts."""
    per_layer = count_macs(model, example_input[:1])[1]
    found = {}
    for group in groups:
        inner = {path for paths in group.sublayers for path in paths}
        names = dict.fromkeys(part.param for part in group.slices)
        names |= dict.fromkeys(name for name, _ in model.named_parameters() if is_within(name, inner))
        weights = sum(model.get_parameter(name).numel() for name in names)
        found[group.name] = weights, sum(per_layer.get(name.removesuffix(".weight"), 0) for name in names)
    return found


def count_macs(model: nn.Module, image: Tensor) -> tuple[int, dict[str, int]]:
    """MACs of the whole model, and of every Linear and Conv2d layer by name."""
    layers = _Layers(model)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), eval_mode(model), frozen(model), _plain_attention(model), counter, layers:
        model(_for(model, image))
    return int(counter.get_total_flops() // 2), layers.macs


def _nominal_saving(model: nn.Module, per_layer: dict[str, int]) -> int:
    """MACs saved if every prunable layer had the mean sparsity of all of them. Source: DIMAP, table 1."""
    try:
        groups = find_groups(model, ["weight"])
    except BadInput:  # a model without groups has no prunable layers to average over
        return 0
    weights = [model.get_parameter(group.name) for group in groups]
    zeros = sum(w.numel() - int(w.count_nonzero()) for w in weights)
    prunable = sum(per_layer.get(group.name.removesuffix(".weight"), 0) for group in groups)
    return round(prunable * zeros / sum(w.numel() for w in weights))


def _zero_share(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch fused attention off inside the model while counting."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


class _Layers(TorchFunctionMode):
    """Counts MACs where weights are used: some attentions of timm use those of a layer without calling it."""

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
            if name is not None:  # every weight of a channel's row is used once per output position
                used = output.numel() // weight.shape[0] * weight.numel()
                self.macs[name] = self.macs.get(name, 0) + used
        return output


def _for(model: nn.Module, given: Tensor) -> Tensor:
    """The input on the model's device, and in the type of its weights unless it is whole numbers (tokens)."""
    weight = next(model.parameters())
    return given.to(weight) if given.is_floating_point() else given.to(weight.device)
