"""Groups of timm's VisionTransformer: ViT, DeiT, DeiT3, DINOv2 and whatever else is built of its Block."""

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from vitprune.architectures import by_module, parts
from vitprune.groups import Group, ParamSlice

ATTENTION = ("attn", "norm1", "ls1", "drop_path1")
FFN = ("mlp", "norm2", "ls2", "drop_path2")
TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")


def groups(model: Any, kind: str) -> list[Group]:
    """All groups of one kind; hidden units, heads and their channels are those of the parts.

    Raises:
        BadInput: a block, attention or MLP of the model is of a type that is not understood.
    """
    if kind == "residual":
        return [_residual(model)]
    blocks = [(f"blocks.{index}", _plain(f"blocks.{index}", block)) for index, block in enumerate(model.blocks)]
    if kind == "block":
        return [_depth([path for path, _ in blocks])]
    if kind in by_module.KINDS:
        return by_module.groups(model, kind)
    return [group for path, block in blocks for group in parts.weights(path, block)]


def uniform_args(model: Any) -> dict[str, int | float]:
    """embed_dim, depth, num_heads and mlp_ratio of a model whose blocks are all alike, else nothing."""
    width, depth = model.embed_dim, len(model.blocks)
    shapes = {(b.attn.num_heads, b.attn.attn_dim, b.mlp.fc1.out_features) for b in model.blocks if type(b) is Block}
    if len(shapes) != 1 or any(type(b) is not Block or type(b.mlp) is not Mlp for b in model.blocks):
        return {}
    number, inner, hidden = shapes.pop()
    pool = model.attn_pool  # has an MLP of the same ratio, which stays whole
    if inner != width or int(width * (hidden / width)) != hidden or (pool and pool.mlp.fc1.out_features != hidden):
        return {}
    return {"embed_dim": width, "depth": depth, "num_heads": number, "mlp_ratio": hidden / width}


def _plain(path: str, block: Any) -> Any:
    if type(block) is not Block:
        raise parts.refuse(path, block, "only timm's plain transformer Block is understood here")
    if type(block.attn) is not Attention:
        raise parts.refuse(f"{path}.attn", block.attn, "only timm's plain Attention is understood here")
    if type(block.mlp) is not Mlp:
        raise parts.refuse(f"{path}.mlp", block.mlp, "only timm's plain Mlp is understood here")
    return block


def _depth(paths: Sequence[str]) -> Group:
    """Sub-layers, attention and FFN in turn. Source: UP-ViTs, block pruning."""
    found = [tuple(f"{path}.{leaf}" for leaf in leaves) for path in paths for leaves in (ATTENTION, FFN)]
    return Group("blocks", "block", (len(found),), (), sublayers=tuple(found), drop=_drop)


def _drop(model: Any, keep: Tensor) -> None:
    """Make plain blocks of what is left, each attention with the FFN behind it."""
    attention, ffn = keep.view(-1, 2).unbind(1)  # (blocks,) each
    firsts = [block for block, stays in zip(model.blocks, attention, strict=True) if stays]
    seconds = [block for block, stays in zip(model.blocks, ffn, strict=True) if stays]
    for first, second in zip(firsts, seconds, strict=True):  # a second is never an earlier first
        for leaf in FFN:
            setattr(first, leaf, getattr(second, leaf))
    model.blocks = model.blocks[: len(firsts)]
    for place, first in enumerate(firsts):
        model.blocks[place] = first
    model.feature_info = model.feature_info[: len(firsts)]


def _residual(model: Any) -> Group:
    """Channels of the residual stream, through the whole model. Source: UP-ViTs, component 1."""
    found: list[ParamSlice] = []
    inner: set[str] = set()
    for path, module in model.named_modules():
        if path == "patch_embed.proj" or path.endswith((".attn.proj", ".mlp.fc2")):
            found += parts.slices(module, path, 0)
            if path != "patch_embed.proj":
                inner.add(f"{path}.weight")
        if path.endswith((".attn.qkv", ".mlp.fc1")) or (
            path in ("head", "head_dist") and isinstance(module, nn.Linear)
        ):
            found += parts.slices(module, path, 1)
            inner |= {f"{path}.weight", f"{path}.bias"}
        elif isinstance(module, parts.NORMS) and ".attn." not in path and ".mlp." not in path:
            found += [ParamSlice(f"{path}.{leaf}", 0) for leaf, _ in module.named_parameters()]
        elif isinstance(module, LayerScale):
            found.append(ParamSlice(f"{path}.gamma", 0))
    found += [ParamSlice(name, 2) for name in TOKENS if getattr(model, name, None) is not None]
    reached = {part.param for part in found} | inner
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        if name not in reached and not (".attn." in name and owner.endswith((".q_norm", ".k_norm"))):
            raise parts.refuse(
                owner or name, model.get_submodule(owner), f"its place in the residual stream ({name}) is unknown"
            )
    return Group("residual", "residual", (model.embed_dim,), tuple(found), resize=resize_width)


def resize_width(model: Any, shape: tuple[int, ...]) -> None:
    """Record a new width of the residual stream."""
    model.embed_dim = model.num_features = model.head_hidden_size = shape[0]
    for feature in model.feature_info:
        feature["num_chs"] = shape[0]
