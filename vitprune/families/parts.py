"""Groups of the parts that families share: MLP, fused-qkv attention, single weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import LayerNorm, RmsNorm
from torch import nn

from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice

NORMS = (nn.LayerNorm, nn.RMSNorm, LayerNorm, RmsNorm)
PRUNABLE = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}


def refuse(path: str, module: nn.Module, why: str) -> BadInput:
    """The error for a module that is not understood, by its name."""
    return BadInput(f"{path} ({type(module).__name__}): {why}; this module cannot be pruned")


def slices(layer: nn.Module, path: str, axis: int, outer: int = 1, inner: int = 1) -> tuple[ParamSlice, ...]:
    """Addresses of a layer's weight along an axis, and of its bias where the axis is the output."""
    parts: tuple[ParamSlice, ...] = (ParamSlice(f"{path}.weight", axis, outer, inner),)
    if axis == 0 and layer.bias is not None:
        parts += (ParamSlice(f"{path}.bias", 0, outer, inner),)
    return parts


def norm(layer: nn.Module, path: str, outer: int = 1) -> tuple[ParamSlice, ...]:
    """Addresses of a LayerNorm's or RMSNorm's own parameters; nothing for no norm at all."""
    if not isinstance(layer, (*NORMS, nn.Identity)):
        raise refuse(path, layer, "only LayerNorm and RMSNorm are understood between channels")
    return tuple(ParamSlice(f"{path}.{leaf}", 0, outer) for leaf, _ in layer.named_parameters())


def stream(
    model: nn.Module, writers: Sequence[str], readers: Sequence[str], norms: Sequence[str]
) -> tuple[ParamSlice, ...]:
    """Addresses of the channels of one residual stream: rows of the layers that write it, columns of its readers."""
    found: tuple[ParamSlice, ...] = ()
    for axis, paths in ((0, writers), (1, readers)):
        for path in paths:
            layer = model.get_submodule(path)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found += slices(layer, path, axis)
            elif not isinstance(layer, nn.Identity):
                raise refuse(path, layer, "expected a Linear or Conv2d layer at the residual stream")
    return found + tuple(part for path in norms for part in norm(model.get_submodule(path), path))


def weights(path: str, block: nn.Module, prunable: Mapping[str, str] = PRUNABLE) -> list[Group]:
    """Every single weight of a block's qkv, proj, fc1 and fc2, one group per layer; `prunable` maps path to pool.

    Source: DIMAP, appendix B; CAP prunes the same layers.
    """
    found = []
    for name, pool in prunable.items():
        layer = block.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise refuse(f"{path}.{name}", layer, "expected a Linear layer")
        param = f"{path}.{name}.weight"
        found.append(Group(param, "weight", tuple(layer.weight.shape), (ParamSlice(param, None),), pool))
    return found


def ffn(path: str, mlp: Any) -> Group:
    """Hidden units of a plain MLP: fc1 row and bias, fc2 column. Source: UP-ViTs, component 3."""
    for leaf in ("fc1", "fc2"):
        if not isinstance(getattr(mlp, leaf, None), nn.Linear):
            raise refuse(path, mlp, f"{leaf} is not a Linear layer")
    if not isinstance(mlp.norm, nn.Identity):
        raise refuse(f"{path}.norm", mlp.norm, "a norm inside the MLP couples its hidden units")
    parts = slices(mlp.fc1, f"{path}.fc1", 0) + slices(mlp.fc2, f"{path}.fc2", 1)
    return Group(path, "ffn", (mlp.fc1.out_features,), parts)


def head_dim(attn: Any) -> int:
    """Channels per head of an attention."""
    return int(attn.proj.in_features // attn.num_heads)


def attention(path: str, attn: Any) -> Group:
    """Channels of an attention's heads, q, k and v together; shape (heads, channels).

    Source: UP-ViTs, component 2.
    """
    width = head_dim(attn)
    parts = slices(attn.qkv, f"{path}.qkv", 0, outer=3) + slices(attn.proj, f"{path}.proj", 1)
    return Group(path, "attention", (attn.num_heads, width), parts, owner=path, resize=resize_channels)


def heads(path: str, attn: Any) -> Group:
    """Whole heads of a fused-qkv attention, with their column of a relative-position table where there is one."""
    width = head_dim(attn)
    parts = slices(attn.qkv, f"{path}.qkv", 0, outer=3, inner=width) + slices(attn.proj, f"{path}.proj", 1, inner=width)
    if "relative_position_bias_table" in dict(attn.named_parameters(recurse=False)):
        parts += (ParamSlice(f"{path}.relative_position_bias_table", 1),)
    return Group(f"{path}.heads", "head", (attn.num_heads,), parts, owner=path, resize=resize_heads)


def resize_heads(attn: Any, shape: tuple[int, ...]) -> None:
    """Record a new number of heads."""
    attn.num_heads = shape[0]
    attn.attn_dim = attn.qkv.out_features // 3


@torch.no_grad()
def resize_channels(attn: Any, shape: tuple[int, ...]) -> None:
    """Record new (heads, channels) and keep the softmax scale of the old head_dim by folding the change into q.

    Both of timm's attention paths scale by the new head_dim, so q carries sqrt(new / old).
    """
    old_scale, (number, width) = attn.scale, shape
    attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale = number, width, number * width, width**-0.5
    attn.qkv.weight[: number * width] *= old_scale / attn.scale
    if attn.qkv.bias is not None:
        attn.qkv.bias[: number * width] *= old_scale / attn.scale


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
    if "relative_position_bias_table" in dict(attn.named_parameters(recurse=False)):
        raise refuse(group.owner, attn, "each head has its own position table, so heads cannot merge")
    return replace(group, shape=(number, group.units // number))
