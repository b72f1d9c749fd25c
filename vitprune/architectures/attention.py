"""Groups of attention heads, and of the channels of heads, for all known attention classes."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models import efficientvit_mit, maxxvit, mvitv2
from torch import nn

from vitprune.architectures.attention_specs import DIFFERENT_WIDTHS, REFUSED, SPECS, AttentionSpec
from vitprune.architectures.slices import (
    SliceSet,
    elementwise_slices,
    input_slices,
    not_prunable,
    output_slices,
    sequential_layers,
)
from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice, Projections


def is_known(module: nn.Module) -> bool:
    """Return whether a module is of a known attention class."""
    return type(module) in SPECS or type(module) in REFUSED or type(module) is efficientvit_mit.LiteMLA


def groups(kind: str, path: str, attn: Any) -> list[Group]:
    """Return the group of a known attention's heads, or of the channels of its heads.

    Args:
        kind: "head" for a group of shape (heads,), "attention" for one of shape (heads, head_dim).
        path: path of the attention in the model.
        attn: the attention.

    Raises:
        BadInput: the attention cannot be pruned in this way.

    Source: UP-ViTs, component 2.
    """
    if type(attn) in REFUSED:
        raise not_prunable(path, attn, REFUSED[type(attn)])
    if type(attn) is efficientvit_mit.LiteMLA:
        return [_linear_attention_heads(kind, path, attn)]
    spec = SPECS[type(attn)]
    _refuse_coupled(kind, path, attn, spec)
    num_heads, reader = attn.num_heads, attn.get_submodule(spec.reader)
    head_dim = next(sequential_layers("", reader))[1].weight.shape[1] // num_heads
    if kind == "attention":
        units = _writer_slices(path, attn, spec, num_heads * head_dim, num_heads)
        units += input_slices(f"{path}.{spec.reader}", reader)
        resize = partial(_resize_channels, spec)
        group = Group(path, kind, (num_heads, head_dim), units.slices, "", path, resize, buffers=units.buffers)
        return [replace(group, projections=_projections(attn, group))]
    units = _writer_slices(path, attn, spec, num_heads, num_heads)
    units += input_slices(f"{path}.{spec.reader}", reader, 1, head_dim)
    units = sum((_per_head_slices(path, attn, leaf, axis) for leaf, axis in spec.per_head), units)
    resize = partial(_resize_heads, spec, head_dim)
    return [Group(f"{path}.heads", kind, (num_heads,), units.slices, "", path, resize, buffers=units.buffers)]


def _projections(attn: Any, group: Group) -> Projections | None:
    """The fused layer of q, k and v; None if a change of basis would change the function."""
    weights = [part for part in group.slices if part.axis == 0 and part.param.endswith(".weight")]
    fused = [part.param.removesuffix(".weight") for part in weights if part.outer == 3]
    layers = {part.param.rpartition(".")[0] for part in group.slices + group.buffers}
    is_plain = len(fused) == 1 and len(layers) == 2 and "scale" in vars(attn)
    return Projections((fused[0],) * 3, group.shape[0]) if is_plain else None


def merge_heads(model: nn.Module, group: Group, number: int) -> Group:
    """Return the group of channels with its heads merged: consecutive heads become one.

    Args:
        model: the model.
        group: a group of kind attention; groups of other kinds are returned unchanged.
        number: number of heads after merging.

    Raises:
        BadInput: the number does not divide the number of heads, or each head has its own parameters.

    Source: UP-ViTs, merging h_b heads into h_t.
    """
    attn = model.get_submodule(group.owner)
    if group.kind != "attention" or group.shape[0] == number:
        return group
    if group.shape[0] % number:
        raise BadInput(f"{group.name}: {group.shape[0]} heads cannot merge into {number}; give a divisor")
    names = [leaf for leaf, _ in SPECS[type(attn)].per_head if _child(attn, leaf) is not None]
    if names:
        what = "position table" if "position" in names[0] else names[0]
        raise not_prunable(group.owner, attn, f"each head has its own {what}, so heads cannot merge")
    return replace(group, shape=(number, group.units // number))


def _refuse_coupled(kind: str, path: str, attn: Any, spec: AttentionSpec) -> None:
    if kind == "attention" and spec.channels_refused:
        raise not_prunable(path, attn, spec.channels_refused)
    if kind == "attention" and spec.head_major and attn.key_dim != attn.val_dim:
        raise not_prunable(path, attn, DIFFERENT_WIDTHS)
    blocking = {**spec.blocks_heads, **spec.blocks_channels} if kind == "attention" else spec.blocks_heads
    for leaf, why in blocking.items():
        if not isinstance(_child(attn, leaf), nn.Identity | None):
            raise not_prunable(f"{path}.{leaf}", _child(attn, leaf), why)
    if isinstance(attn, mvitv2.MultiScaleAttention) and attn.unshared:
        raise not_prunable(path, attn, "its pooling convolutions run over all heads at once")
    if isinstance(attn, AttentionRope) and attn.num_kv_groups > 1:
        raise not_prunable(path, attn, f"{attn.num_kv_groups} heads share one head of keys and values")


def _child(module: Any, name: str) -> Any:
    """A module, parameter or buffer at a path below a module; None if there is none."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)


def _is_head_major(attn: Any, spec: AttentionSpec) -> bool:
    return spec.head_major or (isinstance(attn, maxxvit.Attention2d | maxxvit.AttentionCl) and attn.head_first)


def _writer_slices(path: str, attn: Any, spec: AttentionSpec, units: int, num_heads: int) -> SliceSet:
    """Slices of the units, heads or their channels, in all writers of the heads."""
    result = SliceSet()
    for leaf, outer in spec.writers:
        child, full = _child(attn, leaf), f"{path}.{leaf}"
        if _is_head_major(attn, spec):
            per_unit = _rows_per_unit(full, next(sequential_layers("", child))[1], units)
            if units > num_heads:
                result += output_slices(full, child, per_unit).by_head(num_heads)
            else:
                result += output_slices(full, child, 1, per_unit)
        elif isinstance(child, nn.Module):
            per_unit = _rows_per_unit(full, next(sequential_layers("", child))[1], outer * units)
            result += output_slices(full, child, outer, per_unit)
        elif child is not None:
            part = ParamSlice(full, 0, outer, len(child) // (outer * units))
            result += SliceSet((part,)) if isinstance(child, nn.Parameter) else SliceSet(buffers=(part,))
    return result


def _rows_per_unit(path: str, layer: Any, units: int) -> int:
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.shape[0] % units:
        raise not_prunable(path, layer, f"expected a Linear or Conv2d layer with rows for {units} units")
    return int(layer.weight.shape[0] // units)


def _per_head_slices(path: str, attn: Any, leaf: str, axis: int) -> SliceSet:
    """Slices of a parameter, layer or position table that has one entry per head."""
    child, full = _child(attn, leaf), f"{path}.{leaf}"
    if child is None:
        return SliceSet()
    if isinstance(child, nn.Parameter):
        return SliceSet((ParamSlice(full, axis),))
    if isinstance(child, nn.Linear):
        return output_slices(full, child) if axis == 0 else input_slices(full, child)
    if isinstance(child, RelPosMlp):
        return output_slices(f"{full}.mlp.fc2", child.mlp.fc2)
    if isinstance(child, RelPosBias | RelPosBiasTf):
        head_axis = 1 if isinstance(child, RelPosBias) else 0
        return SliceSet((ParamSlice(f"{full}.relative_position_bias_table", head_axis),))
    raise not_prunable(full, child, "its entries per head are unknown")


def _resize_heads(spec: AttentionSpec, head_dim: int, attn: Any, shape: tuple[int, ...]) -> None:
    """Record a new number of heads."""
    attn.num_heads = shape[0]
    spec.set_sizes(attn, shape[0], head_dim)


@torch.no_grad()
def _resize_channels(spec: AttentionSpec, attn: Any, shape: tuple[int, ...]) -> None:
    """Record a new shape (heads, head_dim), and keep the scale of the attention logits.

    timm scales the logits by head_dim ** -0.5, so the queries are multiplied by sqrt(new head_dim / old head_dim).
    """
    num_heads, head_dim = shape
    attn.num_heads = num_heads
    if spec.scaled:
        factor, attn.scale = attn.scale / head_dim**-0.5, head_dim**-0.5
        layer = _child(attn, spec.writers[0][0])
        for q in (layer.weight, layer.bias, _child(attn, "q_bias")):
            if q is not None and _is_head_major(attn, spec):
                q.view(num_heads, -1, *q.shape[1:])[:, :head_dim] *= factor
            elif q is not None:
                q[: num_heads * head_dim] *= factor
    spec.set_sizes(attn, num_heads, head_dim)


def _linear_attention_heads(kind: str, path: str, attn: Any) -> Group:
    """Heads of EfficientViT's linear attention: rows of qkv, groups of each aggregation, columns of proj."""
    if kind == "attention":
        raise not_prunable(path, attn, "its aggregation mixes the channels of a head")
    rows_per_head = 3 * attn.dim
    num_heads = attn.qkv.conv.out_channels // rows_per_head
    heads = output_slices(f"{path}.qkv", attn.qkv, 1, rows_per_head)
    for index, (depthwise, pointwise) in enumerate(attn.aggreg):
        heads += elementwise_slices(f"{path}.aggreg.{index}.0", depthwise, 1, rows_per_head)
        for leaf, _ in pointwise.named_parameters():
            heads += SliceSet((ParamSlice(f"{path}.aggreg.{index}.1.{leaf}", 0, 1, rows_per_head),))
    heads += input_slices(f"{path}.proj", attn.proj, 1 + len(attn.aggreg), attn.dim)
    resize, name = _resize_linear_attention, f"{path}.heads"
    return Group(name, kind, (num_heads,), heads.slices, owner=path, resize=resize, buffers=heads.buffers)


def _resize_linear_attention(attn: Any, shape: tuple[int, ...]) -> None:
    for _, pointwise in attn.aggreg:
        width = 3 * shape[0] * attn.dim
        pointwise.groups, pointwise.in_channels, pointwise.out_channels = 3 * shape[0], width, width
