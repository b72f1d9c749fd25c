"""Groups of timm's SwinTransformer."""

from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformerBlock

from vitprune.families import parts
from vitprune.groups import Group


def groups(model: Any, kind: str) -> list[Group]:
    """All groups of one kind: single weights, hidden units, heads, attention channels.

    Raises:
        BadInput: residual channels are asked for, or a block or MLP is of a type that is not understood.
    """
    if kind == "residual":
        raise parts.refuse("layers", model.layers, "residual channels of a hierarchical model are not understood yet")
    if kind == "block":
        raise parts.refuse("layers", model.layers, "its blocks come in pairs of plain and shifted windows")
    blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, SwinTransformerBlock)]
    for path, block in blocks:
        if type(block.mlp) is not Mlp:
            raise parts.refuse(f"{path}.mlp", block.mlp, "only timm's plain Mlp is understood here")
    if kind == "weight":
        return [group for path, block in blocks for group in parts.weights(path, block)]
    if kind == "ffn":
        return [parts.ffn(f"{path}.mlp", block.mlp) for path, block in blocks]
    find = parts.heads if kind == "head" else parts.attention
    return [find(f"{path}.attn", block.attn) for path, block in blocks]
