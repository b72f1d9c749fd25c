"""Token merging (ToMe) in a plain ViT: before a block, the most similar pairs of patch tokens become their mean.

The weights do not change, and no token is dropped; the blocks run on fewer tokens. This changes the number of tokens
that the model returns. No other change of a model in this package does this.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.architectures.narrow_attention import TwoWidthAttention, key_rows
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.runtime.arguments import check_arguments

PATH, SUFFIX = "blocks", ".merged"
MAX_MERGED = 1 << 20  # of a saved structure
LEAVE_OUT = "leave merge_tokens out"


class MergingBlocks(nn.Sequential):
    """The blocks of a ViT, with tokens merged before them.

    Tokens have sizes: the numbers of patches that they are the mean of. Attention weighs a token by its size.

    Args:
        blocks: The blocks; their names do not change.
        merged: For every block, the number of tokens that are merged into another one before it.
        prefix: Number of class and register tokens, which are not merged.
    """

    def __init__(self, blocks: Sequence[nn.Module], merged: Sequence[int], prefix: int):
        super().__init__(*blocks)
        self.merged, self.prefix = tuple(merged), prefix

    def __getitem__(self, index: Any) -> Any:
        """Return a block, or some blocks with their merging."""
        blocks = list(self.children())[index]
        return MergingBlocks(blocks, self.merged[index], self.prefix) if isinstance(index, slice) else blocks

    def __delitem__(self, index: int | slice) -> None:
        """Remove blocks with their merging."""
        merged = list(self.merged)
        del merged[index]
        self.merged = tuple(merged)
        super().__delitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on tokens (B, N, C); return (B, fewer tokens, C)."""
        sizes = None
        for number, block in zip(self.merged, self, strict=True):
            number = min(number, (x.shape[1] - self.prefix) // 2)
            if number > 0:
                sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
                x, sizes = _merge(x, sizes, _similarity(block, x, self.prefix), number, self.prefix)
            x = block(x) if sizes is None else block(x, attn_mask=sizes.log().transpose(1, 2)[:, None])
        return x


@check_arguments()
def merge_tokens(model: nn.Module, number: int) -> nn.Module:
    """Merge tokens of a ViT before every block but the first, in place.

    Args:
        model: A plain ViT of timm: VisionTransformer or VisionTransformerDistilled with timm's Block and Attention.
        number: Tokens that are merged into another one before each block, at least 1. If it is more than half of the
            patch tokens, half of them are merged.

    Returns:
        The model. `vitprune.save` and `vitprune.load` keep the merging; plain timm loads the weights without it.

    Raises:
        BadInput: the model is no plain ViT of two blocks or more (the message names the module), or uses gradient
            checkpointing.

    Source: ToMe (Bolya et al., ICLR 2023), by the mean key of all heads; here before the attention of a block.
    """
    if type(number) is not int or not 1 <= number <= MAX_MERGED:
        raise BadInput(f"merge_tokens: {number!r} tokens; give a whole number from 1 to {MAX_MERGED}")
    blocks = _mergeable_blocks(model)
    if len(blocks) < 2:
        raise BadInput(
            f"{type(model).__name__}: has {len(blocks)} block, tokens are merged before the second; {LEAVE_OUT}"
        )
    if model.grad_checkpointing:
        _refuse_checkpointing()
    _replace(model, [0] + [number] * (len(blocks) - 1))
    return model


def merged_tokens(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the entries of a saved model's structure for its merged tokens: blocks.<index>.merged, shape (number,)."""
    blocks = getattr(model, PATH, None)
    if not isinstance(blocks, MergingBlocks):
        return {}
    return {f"{PATH}.{index}{SUFFIX}": (number,) for index, number in enumerate(blocks.merged) if number}


def merging_cuts(model: nn.Module, structure: Mapping[str, Sequence[int]]) -> list[tuple[Group, tuple[int, ...]]]:
    """Return the cuts that merge tokens as a saved structure says, one per block.

    Raises:
        BadInput: the model is no plain ViT.
    """
    wanted = {name: tuple(shape) for name, shape in structure.items() if name.endswith(SUFFIX)}
    names = [f"{PATH}.{index}{SUFFIX}" for index in range(len(_mergeable_blocks(model)) if wanted else 0)]
    return [
        (Group(name, "token", (MAX_MERGED,), (), resize=partial(_set_number, index)), wanted[name])
        for index, name in enumerate(names)
        if name in wanted
    ]


def _set_number(index: int, model: Any, shape: tuple[int, ...]) -> None:
    """Set the number of tokens that are merged before a block."""
    merged = list(getattr(model.blocks, "merged", [0] * len(model.blocks)))
    merged[index] = shape[0]
    _replace(model, merged)


def without_merging(model: nn.Module) -> nn.Module:
    """Return a model that shares all modules and does not merge tokens; the model itself if it merges no tokens."""
    blocks = getattr(model, PATH, None)
    if not isinstance(blocks, MergingBlocks):
        return model
    plain = copy.copy(model)
    plain._modules = dict(model._modules) | {PATH: nn.Sequential(*blocks)}
    return plain


def _mergeable_blocks(model: nn.Module) -> nn.Sequential:
    """Return the blocks of a plain ViT.

    Raises:
        BadInput: the model is of another class, or a block or its attention.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        why = "only VisionTransformer and VisionTransformerDistilled of timm merge tokens"
        raise BadInput(f"{type(model).__name__}: {why}; {LEAVE_OUT}")
    for path, module, kinds in _expected_modules(cast(Any, model).blocks):
        if type(module) not in kinds:
            raise BadInput(
                f"{path}: is a {type(module).__name__}, not timm's {kinds[0].__name__}; its tokens cannot be merged, "
                f"{LEAVE_OUT}"
            )
    return cast(nn.Sequential, model.blocks)


def _expected_modules(blocks: Any) -> Iterator[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    for index, block in enumerate(blocks):
        yield f"{PATH}.{index}", block, (Block,)
        yield f"{PATH}.{index}.attn", block.attn, (Attention, TwoWidthAttention)
        yield f"{PATH}.{index}.mlp", block.mlp, (Mlp,)


def _refuse_checkpointing(enable: bool = True) -> None:
    """Replace `set_grad_checkpointing` of a model: timm's checkpointing runs the blocks without merging."""
    if enable:
        raise BadInput("gradient checkpointing: runs the blocks without merging of tokens; switch one of them off")


def _replace(model: Any, merged: Sequence[int]) -> None:
    model.set_grad_checkpointing = _refuse_checkpointing
    model.blocks = MergingBlocks(list(model.blocks), merged, model.num_prefix_tokens).train(model.blocks.training)


@torch.no_grad()
def _similarity(block: Any, x: Tensor, prefix: int) -> Tensor:
    """Cosine similarity of patch tokens 1, 3, 5, ... to 2, 4, 6, ..., by the mean key of all heads."""
    qkv, number, heads = block.attn.qkv, key_rows(block.attn), block.attn.num_heads
    weight = qkv.weight[number : 2 * number].view(heads, -1, x.shape[-1]).mean(dim=0)
    bias = None if qkv.bias is None else qkv.bias[number : 2 * number].view(heads, -1).mean(dim=0)
    patches = block.norm1.forward(x[:, prefix:])  # without the hooks of the attention's own call
    keys = F.normalize(F.linear(patches, weight, bias), dim=-1)
    return keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)


def _merge(x: Tensor, sizes: Tensor, similarity: Tensor, number: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge `number` of the patch tokens 1, 3, 5, ... into the others, the most similar; return tokens and sizes."""
    with torch.no_grad():
        best, partner = similarity.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        merged, kept = order[:, :number, None], order[:, number:].sort(dim=-1).values[..., None]
        partner = partner[..., None].gather(1, merged)

    def reduced(values: Tensor) -> Tensor:
        first, others = values[:, prefix::2], values[:, prefix + 1 :: 2]
        moved = first.gather(1, merged.expand(-1, -1, values.shape[-1]))
        summed = others.scatter_add(1, partner.expand_as(moved), moved)
        return torch.cat([values[:, :prefix], first.gather(1, kept.expand(-1, -1, values.shape[-1])), summed], dim=1)

    new_sizes = reduced(sizes)
    return reduced(x * sizes) / new_sizes, new_sizes
