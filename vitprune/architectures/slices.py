"""Channels from the layer that writes them to the layer that reads them, and what lies between, one by one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct, SEModule
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import efficientformer_v2, efficientvit_mit, levit, tiny_vit
from torch import nn

from vitprune.architectures.parts import refuse
from vitprune.groups import ParamSlice

PLAIN = (
    nn.Linear,
    nn.Conv2d,
    Conv2dSame,
)  # compute with the weights as they are; a StdConv2d moves zeros away from zero
WRAPPED: dict[type[nn.Module], tuple[str, ...]] = {  # a layer and what follows it, in the order in which they run
    ConvNormAct: ("conv", "bn", "aa"),
    efficientformer_v2.ConvNorm: ("conv", "bn"),
    efficientvit_mit.ConvNormAct: ("conv", "norm", "act"),
    levit.ConvNorm: ("linear", "bn"),
    levit.LinearNorm: ("linear", "bn"),
    tiny_vit.ConvNorm: ("conv", "bn"),
}
SQUEEZES: dict[type[nn.Module], tuple[str, str]] = {
    SEModule: ("fc1", "fc2"),
    efficientnet.SqueezeExcite: ("conv_reduce", "conv_expand"),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


@dataclass(frozen=True)
class SliceSet:
    """Slices of parameters and of buffers."""

    slices: tuple[ParamSlice, ...] = ()
    buffers: tuple[ParamSlice, ...] = ()

    def by_head(self, heads: int) -> "SliceSet":
        """The same, where the runs of each head lie side by side."""
        parts = (self.slices, self.buffers)
        return SliceSet(*(tuple(replace(p, outer=1, heads=heads, runs=p.outer) for p in part) for part in parts))

    def __add__(self, other: "SliceSet") -> "SliceSet":
        return SliceSet(self.slices + other.slices, self.buffers + other.buffers)


def sequential_layers(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """A module as the layers that run one after the other in it; a missing one is none."""
    if type(module) in WRAPPED:
        for leaf in WRAPPED[type(module)]:
            yield from sequential_layers(f"{path}.{leaf}", getattr(module, leaf, None))
    elif module is not None:
        yield path, module


def is_matrix(layer: nn.Module) -> bool:
    """Whether each output of a layer reads all its inputs, at one or several positions."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def plain(path: str, layer: Any) -> Any:
    """The layer itself.

    Raises:
        BadInput: it is none, is grouped, or does not use its weights as they are.
    """
    if type(layer) not in PLAIN or not is_matrix(layer):
        raise refuse(path, layer, "expected a Linear or Conv2d layer that uses its weights as they are")
    return layer


def output_slices(path: str, module: Any, outer: int = 1, inner: int = 1) -> SliceSet:
    """Addresses of the channels that a layer writes, and of what follows it in the same module."""
    (first, layer), *behind = sequential_layers(path, module)
    found = SliceSet(_named(first, plain(first, layer), 0, outer, inner))
    return sum((elementwise_slices(name, other, outer, inner) for name, other in behind), found)


def input_slices(path: str, module: Any, outer: int = 1, inner: int = 1) -> SliceSet:
    """Addresses of the channels that a layer reads."""
    first, layer = next(sequential_layers(path, module))
    return SliceSet((ParamSlice(f"{first}.weight", 1, outer, inner),)) if plain(first, layer) is layer else SliceSet()


def elementwise_slices(path: str, module: Any, outer: int = 1, inner: int = 1) -> SliceSet:
    """Addresses of the channels in a module that keeps them apart: BatchNorm, depth-wise convolution, excitation.

    Raises:
        BadInput: the module mixes channels, or is not understood.
    """
    kind = type(module)
    if kind in BATCH_NORMS and module.affine:
        statistics = [name for name in ("running_mean", "running_var") if getattr(module, name) is not None]
        found = SliceSet(
            _named(path, module, 0, outer, inner),
            tuple(ParamSlice(f"{path}.{name}", 0, outer, inner) for name in statistics),
        )
        return sum(
            (elementwise_slices(f"{path}.{leaf}", child, outer, inner) for leaf, child in module.named_children()),
            found,
        )
    if (
        kind in PLAIN
        and isinstance(module, nn.Conv2d)
        and 1 < module.groups == module.in_channels == module.out_channels
    ):
        return SliceSet(_named(path, module, 0, outer, inner))
    if kind in SQUEEZES:
        reads, writes = SQUEEZES[kind]
        squeezed = input_slices(f"{path}.{reads}", getattr(module, reads), outer, inner)
        return squeezed + output_slices(f"{path}.{writes}", getattr(module, writes), outer, inner)
    if "Norm" in kind.__name__:
        raise refuse(path, module, "a norm inside the MLP couples its hidden units")
    if all(parameter.numel() == 1 for parameter in module.parameters()) and not list(module.buffers()):
        return SliceSet()
    raise refuse(path, module, "what it does to hidden units one by one is not known")


def _named(path: str, layer: Any, axis: int, outer: int, inner: int) -> tuple[ParamSlice, ...]:
    return tuple(
        ParamSlice(f"{path}.{leaf}", axis, outer, inner)
        for leaf in ("weight", "bias")
        if getattr(layer, leaf) is not None
    )
