"""Groups of timm's VisionTransformer: ViT, DeiT, DeiT3, DINOv2 and other models built from its Block."""

from typing import Any

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor

from vitprune.groups import Group

ATTENTION = ("attn", "norm1", "ls1", "drop_path1")  # modules of a block that belong to its attention
FFN = ("mlp", "norm2", "ls2", "drop_path2")


def sublayers(model: Any) -> Group:
    """Return the group of all sub-layers, attention and FFN in turn.

    Source: UP-ViTs, blocks.
    """
    paths = [f"blocks.{index}" for index in range(len(model.blocks))]
    modules = tuple(tuple(f"{path}.{leaf}" for leaf in leaves) for path in paths for leaves in (ATTENTION, FFN))
    return Group("blocks", "block", (len(modules),), (), sublayers=modules, drop=_drop)


def has_plain_blocks(model: Any, others: tuple[type, ...] = ()) -> bool:
    """Return whether all blocks are timm's plain transformer Block, with plain Attention and Mlp or one of `others`."""
    return all(
        type(block) is Block and type(block.attn) in (Attention, *others) and type(block.mlp) in (Mlp, *others)
        for block in model.blocks
    )


def uniform_args(model: Any) -> dict[str, int | float]:
    """Return embed_dim, depth, num_heads and mlp_ratio for timm.create_model; empty if the blocks differ."""
    width, depth = model.embed_dim, len(model.blocks)
    if not has_plain_blocks(model):
        return {}
    shapes = {(b.attn.num_heads, b.attn.attn_dim, b.mlp.fc1.out_features) for b in model.blocks}
    if len(shapes) != 1:
        return {}
    num_heads, attn_dim, hidden = shapes.pop()
    pool = model.attn_pool  # its MLP has the same mlp_ratio and is not pruned
    if attn_dim != width or int(width * (hidden / width)) != hidden or (pool and pool.mlp.fc1.out_features != hidden):
        return {}
    return {"embed_dim": width, "depth": depth, "num_heads": num_heads, "mlp_ratio": hidden / width}


def _drop(model: Any, keep: Tensor) -> None:
    """Rebuild blocks from the kept sub-layers: every attention with the next FFN."""
    keep_attention, keep_ffn = keep.view(-1, 2).unbind(1)  # (blocks,) each
    attentions = [block for block, kept in zip(model.blocks, keep_attention, strict=True) if kept]
    ffns = [block for block, kept in zip(model.blocks, keep_ffn, strict=True) if kept]
    for attention, ffn in zip(attentions, ffns, strict=True):  # an FFN never comes from an earlier block of the list
        for leaf in FFN:
            setattr(attention, leaf, getattr(ffn, leaf))
    model.blocks = model.blocks[: len(attentions)]
    for index, block in enumerate(attentions):
        model.blocks[index] = block
    model.feature_info = model.feature_info[: len(attentions)]
