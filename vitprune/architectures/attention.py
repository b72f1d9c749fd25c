"""Heads, and channels of heads, of every attention that we know, as groups."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models import efficientvit_mit, maxxvit, mvitv2
from torch import nn

from vitprune.architectures.attention_specs import CLOSED, HEADS, UNLIKE, AttentionSpec
from vitprune.architectures.parts import refuse
from vitprune.architectures.slices import SliceSet, elementwise_slices, input_slices, output_slices, sequential_layers
from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice


def known(module: nn.Module) -> bool:
    """Whether there is a rule for a module."""
    return type(module) in HEADS or type(module) in CLOSED or type(module) is efficientvit_mit.LiteMLA


def groups(kind: str, path: str, attn: Any) -> list[Group]:
    """The heads of a known attention, shape (heads,), or the channels of its heads, shape (heads, channels).

    Raises:
        BadInput: it cannot lose them, or is not understood.

    Source: UP-ViTs, component 2.
    """
    if type(attn) in CLOSED:
        raise refuse(path, attn, CLOSED[type(attn)])
    if type(attn) is efficientvit_mit.LiteMLA:
        return [_linear(kind, path, attn)]
    heads = HEADS[type(attn)]
    _refuse(kind, path, attn, heads)
    number, total = attn.num_heads, _reader(attn, heads).weight.shape[1]
    width = total // number
    if kind == "attention":
        found = _found(path, attn, heads, number * width, number)
        found += input_slices(f"{path}.{heads.reader}", attn.get_submodule(heads.reader))
        resize = partial(_resize_channels, heads)
        return [Group(path, kind, (number, width), found.slices, owner=path, resize=resize, buffers=found.buffers)]
    found = _found(path, attn, heads, number, number)
    found += input_slices(f"{path}.{heads.reader}", attn.get_submodule(heads.reader), 1, width)
    found = sum((_owned(path, attn, name, axis) for name, axis in heads.own), found)
    resize = partial(_resize_heads, heads, width)
    return [Group(f"{path}.heads", kind, (number,), found.slices, owner=path, resize=resize, buffers=found.buffers)]


def merge_heads(model: nn.Module, group: Group, number: int) -> Group:
    """The same channels read as fewer heads: consecutive heads merge, and compete with each other from then on.

    Raises:
        BadInput: the heads do not divide, or each has parameters of its own that cannot merge.

    Source: UP-ViTs, merging h_b heads into h_t.
    """
    attn = model.get_submodule(group.owner)
    if group.kind != "attention" or group.shape[0] == number:
        return group
    if group.shape[0] % number:
        raise BadInput(f"{group.name}: {group.shape[0]} heads cannot merge into {number}; give a divisor")
    names = [name for name, _ in HEADS[type(attn)].own if _child(attn, name) is not None]
    if names:
        own = "position table" if "position" in names[0] else names[0]
        raise refuse(group.owner, attn, f"each head has its own {own}, so heads cannot merge")
    return replace(group, shape=(number, group.units // number))


def _refuse(kind: str, path: str, attn: Any, heads: AttentionSpec) -> None:
    if kind == "attention" and heads.channels:
        raise refuse(path, attn, heads.channels)
    if kind == "attention" and heads.side_by_side and attn.key_dim != attn.val_dim:
        raise refuse(path, attn, UNLIKE)
    for leaf, why in (heads.whole | heads.apart if kind == "attention" else heads.whole).items():  # type: ignore[operator]
        if not isinstance(_child(attn, leaf), nn.Identity | None):
            raise refuse(f"{path}.{leaf}", _child(attn, leaf), why)
    if isinstance(attn, mvitv2.MultiScaleAttention) and attn.unshared:
        raise refuse(path, attn, "its pooling convolutions run over all heads at once")
    if isinstance(attn, AttentionRope) and attn.num_kv_groups > 1:
        raise refuse(path, attn, f"{attn.num_kv_groups} heads share one head of keys and values")


def _reader(attn: Any, heads: AttentionSpec) -> Any:
    return next(sequential_layers("", attn.get_submodule(heads.reader)))[1]


def _child(module: Any, name: str) -> Any:
    """A module, parameter or buffer at a path below a module; None where there is none."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)


def _side_by_side(attn: Any, heads: AttentionSpec) -> bool:
    return heads.side_by_side or (isinstance(attn, maxxvit.Attention2d | maxxvit.AttentionCl) and attn.head_first)


def _found(path: str, attn: Any, heads: AttentionSpec, units: int, number: int) -> SliceSet:
    """Where the units, heads or their channels, lie in all that has rows by head."""
    found = SliceSet()
    for name, outer in heads.rows:
        child = _child(attn, name)
        if _side_by_side(attn, heads):
            runs = _inner(f"{path}.{name}", next(sequential_layers("", child))[1], units)
            found += (
                output_slices(f"{path}.{name}", child, runs).by_head(number)
                if units > number
                else output_slices(f"{path}.{name}", child, 1, runs)
            )
            continue
        if isinstance(child, nn.Module):
            _, layer = next(sequential_layers("", child))
            found += output_slices(f"{path}.{name}", child, outer, _inner(f"{path}.{name}", layer, outer * units))
        elif child is not None:
            part = ParamSlice(f"{path}.{name}", 0, outer, len(child) // (outer * units))
            found += SliceSet((part,)) if isinstance(child, nn.Parameter) else SliceSet(buffers=(part,))
    return found


def _inner(path: str, layer: Any, units: int) -> int:
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.shape[0] % units:
        raise refuse(path, layer, f"expected a Linear or Conv2d layer with rows for {units} units")
    return int(layer.weight.shape[0] // units)


def _owned(path: str, attn: Any, name: str, axis: int) -> SliceSet:
    """What each head has for itself: an entry of a parameter, a row (and bias) of a layer, a part of a table."""
    child, full = _child(attn, name), f"{path}.{name}"
    if child is None:
        return SliceSet()
    if isinstance(child, nn.Parameter):
        return SliceSet((ParamSlice(full, axis),))
    if isinstance(child, nn.Linear):
        return output_slices(full, child) if axis == 0 else input_slices(full, child)
    if isinstance(child, RelPosMlp):
        return output_slices(f"{full}.mlp.fc2", child.mlp.fc2)
    if isinstance(child, RelPosBias | RelPosBiasTf):
        return SliceSet(
            (ParamSlice(f"{full}.relative_position_bias_table", 1 if isinstance(child, RelPosBias) else 0),)
        )
    raise refuse(full, child, "what each head owns of it is not known")


def _resize_heads(heads: AttentionSpec, width: int, attn: Any, shape: tuple[int, ...]) -> None:
    """Record a new number of heads."""
    attn.num_heads = shape[0]
    heads.sizes(attn, shape[0], width)


@torch.no_grad()
def _resize_channels(heads: AttentionSpec, attn: Any, shape: tuple[int, ...]) -> None:
    """Record new (heads, channels) and keep the softmax scale of the old width by folding the change into q.

    timm's fused attention scales by the new width, so q carries sqrt(new / old).
    """
    number, width = shape
    attn.num_heads = number
    if heads.scaled:
        factor, attn.scale = attn.scale / width**-0.5, width**-0.5
        layer = _child(attn, heads.rows[0][0])
        for q in (layer.weight, layer.bias, _child(attn, "q_bias")):
            if q is not None and _side_by_side(attn, heads):
                q.view(number, -1, *q.shape[1:])[:, :width] *= factor
            elif q is not None:
                q[: number * width] *= factor
    heads.sizes(attn, number, width)


def _linear(kind: str, path: str, attn: Any) -> Group:
    """Heads of a multi-scale linear attention: rows of q, k and v, groups of each aggregation, columns of proj."""
    if kind == "attention":
        raise refuse(path, attn, "its aggregation mixes the channels of a head")
    rows_of_head = 3 * attn.dim
    number = attn.qkv.conv.out_channels // rows_of_head
    found = output_slices(f"{path}.qkv", attn.qkv, 1, rows_of_head)
    for index, (deep, wide) in enumerate(attn.aggreg):
        found += elementwise_slices(f"{path}.aggreg.{index}.0", deep, 1, rows_of_head)
        for leaf, _ in wide.named_parameters():
            found += SliceSet((ParamSlice(f"{path}.aggreg.{index}.1.{leaf}", 0, 1, rows_of_head),))
    found += input_slices(f"{path}.proj", attn.proj, 1 + len(attn.aggreg), attn.dim)
    return Group(
        f"{path}.heads", kind, (number,), found.slices, owner=path, resize=_resize_linear, buffers=found.buffers
    )


def _resize_linear(attn: Any, shape: tuple[int, ...]) -> None:
    for _, wide in attn.aggreg:
        wide.groups, wide.in_channels, wide.out_channels = 3 * shape[0], *(2 * (3 * shape[0] * attn.dim,))
