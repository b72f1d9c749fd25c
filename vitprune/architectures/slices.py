"""Build the ParamSlices of a layer: output rows, input columns, elementwise parameters and single weights."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct, SEModule
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import efficientformer_v2, efficientvit_mit, levit, tiny_vit
from torch import nn

from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice

PLAIN = (nn.Linear, nn.Conv2d, Conv2dSame)  # use their weights unchanged; a StdConv2d standardizes them, zeros too
WRAPPED: dict[type[nn.Module], tuple[str, ...]] = {  # modules that run these layers in this order
    ConvNormAct: ("conv", "bn", "aa"),
    efficientformer_v2.ConvNorm: ("conv", "bn"),
    efficientvit_mit.ConvNormAct: ("conv", "norm", "act"),
    levit.ConvNorm: ("linear", "bn"),
    levit.LinearNorm: ("linear", "bn"),
    tiny_vit.ConvNorm: ("conv", "bn"),
}
SQUEEZES: dict[type[nn.Module], tuple[str, str]] = {  # squeeze-and-excitation: the reducing and the expanding layer
    SEModule: ("fc1", "fc2"),
    efficientnet.SqueezeExcite: ("conv_reduce", "conv_expand"),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
BLOCK_LINEARS = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}  # layer: its type
NOT_PLAIN = "expected a Linear or Conv2d layer that uses its weights unchanged"


def not_prunable(path: str, module: nn.Module, why: str) -> BadInput:
    """Return the error that names a module which cannot be pruned and gives the reason."""
    return BadInput(f"{path} ({type(module).__name__}): {why}; this module cannot be pruned")


@dataclass(frozen=True)
class SliceSet:
    """Slices of parameters and of buffers that belong to the same units."""

    slices: tuple[ParamSlice, ...] = ()
    buffers: tuple[ParamSlice, ...] = ()

    def by_head(self, heads: int) -> "SliceSet":
        """Return the same slices for a layout in which q, k and v of one head come before those of the next head."""
        both = (self.slices, self.buffers)
        return SliceSet(*(tuple(replace(s, outer=1, heads=heads, runs=s.outer) for s in slices) for slices in both))

    def __add__(self, other: "SliceSet") -> "SliceSet":
        return SliceSet(self.slices + other.slices, self.buffers + other.buffers)


def sequential_layers(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and module of the layers that a module runs one after the other; nothing for None."""
    if type(module) in WRAPPED:
        for leaf in WRAPPED[type(module)]:
            yield from sequential_layers(f"{path}.{leaf}", getattr(module, leaf, None))
    elif module is not None:
        yield path, module


def mixes_channels(layer: nn.Module) -> bool:
    """Return whether every output channel of a layer depends on all input channels (Linear, ungrouped Conv2d)."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def output_slices(path: str, module: Any, outer: int = 1, inner: int = 1) -> SliceSet:
    """Return the slices of the output channels of a layer: weight rows, bias and the norm that follows in the module.

    Args:
        path: path of the module in the model.
        module: a Linear, an ungrouped Conv2d, or a module of WRAPPED.
        outer: number of repetitions of all units along the axis, such as 3 for q, k and v.
        inner: number of consecutive channels of one unit, such as the width of a head.

    Raises:
        BadInput: the layer mixes no channels or does not use its weights unchanged.
    """
    (first, layer), *following = sequential_layers(path, module)
    result = SliceSet(_weight_and_bias(first, _plain(first, layer), 0, outer, inner))
    return sum((elementwise_slices(name, other, outer, inner) for name, other in following), result)


def input_slices(path: str, module: Any, outer: int = 1, inner: int = 1) -> SliceSet:
    """Return the slice of the input channels of a layer: columns of its weight. Arguments: as of `output_slices`."""
    first, layer = next(sequential_layers(path, module))
    _plain(first, layer)
    return SliceSet((ParamSlice(f"{first}.weight", 1, outer, inner),))


def elementwise_slices(path: str, module: Any, outer: int = 1, inner: int = 1) -> SliceSet:
    """Return the slices of a module that maps every channel to itself.

    These are BatchNorm, depth-wise convolution, squeeze-and-excitation, and modules without parameters per channel.
    Arguments: as of `output_slices`.

    Raises:
        BadInput: the module mixes channels or is of an unknown class.
    """
    kind = type(module)
    if kind in BATCH_NORMS and module.affine:
        statistics = [name for name in ("running_mean", "running_var") if getattr(module, name) is not None]
        buffers = tuple(ParamSlice(f"{path}.{name}", 0, outer, inner) for name in statistics)
        result = SliceSet(_weight_and_bias(path, module, 0, outer, inner), buffers)
        children = (
            elementwise_slices(f"{path}.{leaf}", child, outer, inner) for leaf, child in module.named_children()
        )
        return sum(children, result)
    if kind in PLAIN and isinstance(module, nn.Conv2d) and is_depthwise(module):
        return SliceSet(_weight_and_bias(path, module, 0, outer, inner))
    if kind in SQUEEZES:
        reduce, expand = SQUEEZES[kind]
        result = input_slices(f"{path}.{reduce}", getattr(module, reduce), outer, inner)
        return result + output_slices(f"{path}.{expand}", getattr(module, expand), outer, inner)
    if "Norm" in kind.__name__:
        raise not_prunable(path, module, "a norm inside the MLP couples its hidden units")
    if all(parameter.numel() == 1 for parameter in module.parameters()) and not list(module.buffers()):
        return SliceSet()
    raise not_prunable(path, module, "its effect on single hidden units is unknown")


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Return whether a convolution maps every channel to one channel of its own."""
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def weight_group(path: str, layer: Any, layer_type: str) -> Group:
    """Return the group of all single weights of a layer.

    Args:
        path: path of the layer in the model.
        layer: a Linear or Conv2d.
        layer_type: DIMAP module of the layer, such as qkv, proj or mlp.

    Raises:
        BadInput: the layer does not use its weights unchanged.

    Source: DIMAP, appendix B; CAP prunes the same layers.
    """
    if type(layer) not in PLAIN:
        raise not_prunable(path, layer, NOT_PLAIN)
    param = f"{path}.weight"
    return Group(param, "weight", tuple(layer.weight.shape), (ParamSlice(param, None),), layer_type)


def block_weights(
    blocks: Iterable[tuple[str, nn.Module]], layer_types: Mapping[str, str] = BLOCK_LINEARS
) -> list[Group]:
    """Return the groups of all single weights of these layers of every block, given as (path, block).

    A removed branch has no layers.
    """
    return [
        weight_group(f"{path}.{leaf}", block.get_submodule(leaf), layer_type)
        for path, block in blocks
        for leaf, layer_type in layer_types.items()
        if list(block.get_submodule(leaf.partition(".")[0]).children())
    ]


def _plain(path: str, layer: Any) -> Any:
    if type(layer) not in PLAIN or not mixes_channels(layer):
        raise not_prunable(path, layer, NOT_PLAIN)
    return layer


def _weight_and_bias(path: str, layer: Any, axis: int, outer: int, inner: int) -> tuple[ParamSlice, ...]:
    names = [leaf for leaf in ("weight", "bias") if getattr(layer, leaf) is not None]
    return tuple(ParamSlice(f"{path}.{leaf}", axis, outer, inner) for leaf in names)
