"""Chains of timm's models: how each computes its answer, branch by branch."""

from collections.abc import Callable
from typing import Any

import timm.layers
from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from vitprune.architectures import causal_lm, parts, pvt_chain
from vitprune.architectures.block_removal import IdentityBlock
from vitprune.architectures.chain import Branch, Chain, Perceptron, SelfAttention, Step
from vitprune.errors import BadInput


def chain(model: nn.Module) -> Chain:
    """The chain of a model; it shares the model's modules, and equals the model in evaluation mode.

    Raises:
        BadInput: the model, or a module of it, is not understood; it is named.
    """
    build = CHAINS.get(type(model))
    if build is None:
        known = ", ".join(family.__name__ for family in CHAINS)
        raise BadInput(f"{type(model).__name__}: exact scoring is not supported yet; supported are {known}")
    return build(model)


def _vit(model: Any) -> Chain:
    """ViT and DeiT: attention and MLP of every block, then norm, pooling and head."""
    steps: list[Step] = [] if isinstance(model.norm_pre, nn.Identity) else [model.norm_pre]
    for index, block in enumerate(model.blocks):
        steps += _block(f"blocks.{index}", block)
    reads = 1 if model.global_pool == "token" and model.attn_pool is None else None
    ending: tuple[Step, ...] = (model.norm, model.pool, model.fc_norm, model.head_drop, model.head)
    if type(model) is VisionTransformerDistilled:
        reads, ending = 2, (model.norm, model.forward_head)
    return Chain(lambda images: _embedded(model, images), tuple(steps), ending, reads, _narrow(model, steps))


def _embedded(model: Any, images: Tensor) -> Tensor:
    stream: Tensor = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    return stream


def _block(path: str, block: Any) -> list[Step]:
    if type(block) is not Block:
        raise parts.refuse(path, block, "only timm's plain transformer Block is understood here")
    return [
        Branch(f"{path}.attn", "attention", block.norm1, block.attn, block.ls1, _proj(block.attn), _heads(block.attn)),
        Branch(f"{path}.mlp", "ffn", block.norm2, block.mlp, block.ls2, _last(block.mlp), _hidden(block.mlp)),
    ]


def _proj(attn: Any) -> nn.Linear | None:
    return attn.proj if type(attn) is Attention else None


def _heads(attn: Any) -> SelfAttention | None:
    plain = type(attn) is Attention and attn.gate is None and isinstance(attn.norm, nn.Identity)
    return SelfAttention(attn.qkv, attn.q_norm, attn.k_norm, attn.num_heads, attn.scale) if plain else None


def _hidden(mlp: Any) -> Perceptron | None:
    plain = type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)
    return Perceptron(mlp.fc1, mlp.act) if plain else None


def _last(mlp: Any) -> nn.Linear | None:
    return mlp.fc2 if isinstance(mlp.fc2, nn.Linear) else None


def _narrow(model: Any, steps: list[Step]) -> bool:
    """Whether every norm of the stream is a LayerNorm, every branch plain, and no other module knows the width."""
    norms = [step.norm for step in steps if isinstance(step, Branch)] + [model.norm_pre, model.norm, model.fc_norm]
    plain = (nn.Identity, nn.LayerNorm, timm.layers.LayerNorm)
    return (
        all(type(norm) in plain for norm in norms)
        and all(step.inside is not None for step in steps if isinstance(step, Branch))
        and all(type(step.scale) in (nn.Identity, LayerScale) for step in steps if isinstance(step, Branch))
        and isinstance(model.patch_embed.norm, nn.Identity)
        and model.attn_pool is None
    )


def _swin(model: Any) -> Chain:
    """Swin: the stages' patch merging, then the two branches of each of their blocks."""
    steps: list[Step] = []
    for number, stage in enumerate(model.layers):
        if not isinstance(stage.downsample, nn.Identity):
            steps.append(stage.downsample)
        for index, block in enumerate(stage.blocks):
            if type(block) is not IdentityBlock:
                steps += _window_block(f"layers.{number}.blocks.{index}", block)
    return Chain(model.patch_embed, tuple(steps), (model.norm, model.head))


def _window_block(path: str, block: Any) -> list[Step]:
    if type(block) is not SwinTransformerBlock:
        raise parts.refuse(path, block, "only timm's SwinTransformerBlock is understood here")
    if type(block.attn) is not WindowAttention:
        raise parts.refuse(f"{path}.attn", block.attn, "only timm's WindowAttention is understood here")
    whole = nn.Identity()
    return [
        Branch(f"{path}.attn", "attention", block.norm1, block._attn, whole),
        Branch(f"{path}.mlp", "ffn", block.norm2, block.mlp, whole, _last(block.mlp), _hidden(block.mlp)),
    ]


CHAINS: dict[type[nn.Module], Callable[[Any], Chain]] = {
    VisionTransformer: _vit,
    VisionTransformerDistilled: _vit,
    SwinTransformer: _swin,
    PyramidVisionTransformerV2: pvt_chain.chain,
    causal_lm.Decoder: causal_lm.chain,
}
