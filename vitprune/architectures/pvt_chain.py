"""The chain of PVTv2: a stream of maps (B, H, W, channels), a new one behind every stage."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from vitprune.architectures import parts
from vitprune.architectures.block_removal import IdentityBlock
from vitprune.architectures.chain import Branch, Chain, Step
from vitprune.architectures.pvt import plain


def chain(model: Any) -> Chain:
    """The two branches of every block, and between stages a norm and a patch embedding.

    Raises:
        BadInput: a block, or a part of it, is of a type that is not understood; it is named.
    """
    steps: list[Step] = []
    for number, stage in enumerate(model.stages):
        if number:
            steps.append(partial(_onto_the_next, model.stages[number - 1].norm, stage.downsample))
        for index, block in enumerate(stage.blocks):
            if type(block) is not IdentityBlock:
                steps += _block(f"stages.{number}.blocks.{index}", block)
    return Chain(model.patch_embed, tuple(steps), (model.stages[-1].norm, partial(_answer, model)))


def _block(path: str, block: Any) -> list[Step]:
    attn, mlp, whole = plain(path, block).attn, block.mlp, nn.Identity()
    for leaf, layer in (("attn.proj", attn.proj), ("mlp.fc2", mlp.fc2)):
        if not isinstance(layer, nn.Linear):
            raise parts.refuse(f"{path}.{leaf}", layer, "expected a Linear layer")
    return [
        Branch(f"{path}.attn", "attention", block.norm1, partial(_over_a_map, attn), whole, attn.proj),
        Branch(f"{path}.mlp", "ffn", block.norm2, partial(_over_a_map, mlp), whole, mlp.fc2),
    ]


def _over_a_map(body: Any, grid: Tensor) -> Tensor:
    """Run an attention or MLP, which takes tokens and the size of their map, over (B, H, W, channels)."""
    added: Tensor = body(grid.flatten(1, 2), grid.shape[1:3])
    return added.view(grid.shape)


def _onto_the_next(norm: nn.Module, embed: nn.Module, grid: Tensor) -> Tensor:
    stream: Tensor = embed(norm(grid).permute(0, 3, 1, 2))
    return stream


def _answer(model: Any, grid: Tensor) -> Tensor:
    logits: Tensor = model.forward_head(grid.permute(0, 3, 1, 2))
    return logits
