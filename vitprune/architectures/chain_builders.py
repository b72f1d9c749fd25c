"""Build the residual chain of a ViT, DeiT, Swin, PVTv2 or causal language model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.layers
from timm.layers import Attention, Mlp
from timm.models import pvt_v2
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from vitprune.architectures.block_removal import IdentityBlock
from vitprune.architectures.causal_lm import Decoder
from vitprune.architectures.chain import AttentionLayers, Branch, Chain, MlpLayers, Step
from vitprune.architectures.inferred_widths import original_class
from vitprune.architectures.slices import not_prunable
from vitprune.architectures.token_merging import without_merging
from vitprune.errors import BadInput


def build_chain(model: nn.Module) -> Chain:
    """Build the residual chain of a model.

    Args:
        model: A timm ViT, DeiT, Swin or PVTv2, or a `Decoder`.

    Returns:
        A chain that shares the model's modules. Its output equals the model's in evaluation mode.

    Raises:
        BadInput: the model class or one of its modules is not supported; the message names it.
    """
    build = CHAINS.get(type(model))
    if build is None:
        supported = ", ".join(family.__name__ for family in CHAINS)
        raise BadInput(
            f"{type(model).__name__}: exact KL scores are computed of {supported} only; use method upvits-fisher, or "
            "upvits-literal with few images"
        )
    if without_merging(model) is not model:
        raise BadInput("exact scoring: does not follow merged tokens; use upvits-fisher or unit-obs")
    return build(model)


def _vit(model: Any) -> Chain:
    steps: list[Step] = [] if isinstance(model.norm_pre, nn.Identity) else [model.norm_pre]
    for index, block in enumerate(model.blocks):
        steps += _vit_block(f"blocks.{index}", block)
    num_tokens_read = 1 if model.global_pool == "token" and model.attn_pool is None else None
    head: tuple[Step, ...] = (model.norm, model.pool, model.fc_norm, model.head_drop, model.head)
    if type(model) is VisionTransformerDistilled:
        num_tokens_read, head = 2, (model.norm, model.forward_head)
    embed = partial(_embed_patches, model)
    return Chain(embed, tuple(steps), head, num_tokens_read, _allows_channel_ablation(model, steps))


def _embed_patches(model: Any, images: Tensor) -> Tensor:
    stream: Tensor = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    return stream


def _vit_block(path: str, block: Any) -> list[Step]:
    if type(block) is not Block:
        raise not_prunable(path, block, "only timm's plain transformer Block is supported")
    attn, mlp = block.attn, block.mlp
    proj = attn.proj if type(attn) is Attention else None
    return [
        Branch(f"{path}.attn", "attention", block.norm1, attn, block.ls1, proj, _attention_layers(attn)),
        Branch(f"{path}.mlp", "ffn", block.norm2, mlp, block.ls2, _output_linear(mlp), _mlp_layers(mlp)),
    ]


def _attention_layers(attn: Any) -> AttentionLayers | None:
    plain = type(attn) is Attention and attn.gate is None and isinstance(attn.norm, nn.Identity)
    return AttentionLayers(attn.qkv, attn.q_norm, attn.k_norm, attn.num_heads, attn.scale) if plain else None


def _mlp_layers(mlp: Any) -> MlpLayers | None:
    plain = type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)
    return MlpLayers(mlp.fc1, mlp.act) if plain else None


def _output_linear(mlp: Any) -> nn.Linear | None:
    return mlp.fc2 if isinstance(mlp.fc2, nn.Linear) else None


def _allows_channel_ablation(model: Any, steps: list[Step]) -> bool:
    """Whether all norms of the stream are LayerNorms, all branches are plain, and nothing else reads the width."""
    branches = [step for step in steps if isinstance(step, Branch)]
    norms = [branch.norm for branch in branches] + [model.norm_pre, model.norm, model.fc_norm]
    return (
        all(type(norm) in (nn.Identity, nn.LayerNorm, timm.layers.LayerNorm) for norm in norms)
        and all(branch.layers is not None for branch in branches)
        and all(type(branch.scale) in (nn.Identity, LayerScale) for branch in branches)
        and isinstance(model.patch_embed.norm, nn.Identity)
        and model.attn_pool is None
    )


def _swin(model: Any) -> Chain:
    steps: list[Step] = []
    for number, stage in enumerate(model.layers):
        if not isinstance(stage.downsample, nn.Identity):
            steps.append(stage.downsample)
        for index, block in enumerate(stage.blocks):
            if type(block) is not IdentityBlock:
                steps += _swin_block(f"layers.{number}.blocks.{index}", block)
    return Chain(model.patch_embed, tuple(steps), (model.norm, model.head))


def _swin_block(path: str, block: Any) -> list[Step]:
    if type(block) is not SwinTransformerBlock:
        raise not_prunable(path, block, "only timm's SwinTransformerBlock is supported")
    if type(block.attn) is not WindowAttention:
        raise not_prunable(f"{path}.attn", block.attn, "only timm's WindowAttention is supported")
    mlp, no_scale = block.mlp, nn.Identity()
    return [
        Branch(f"{path}.attn", "attention", block.norm1, block._attn, no_scale),
        Branch(f"{path}.mlp", "ffn", block.norm2, mlp, no_scale, _output_linear(mlp), _mlp_layers(mlp)),
    ]


def _pvt(model: Any) -> Chain:
    """The residual stream of PVTv2 is a feature map (B, H, W, channels)."""
    steps: list[Step] = []
    for number, stage in enumerate(model.stages):
        if number:
            steps.append(partial(_next_stage, model.stages[number - 1].norm, stage.downsample))
        for index, block in enumerate(stage.blocks):
            if type(block) is not IdentityBlock:
                steps += _pvt_block(f"stages.{number}.blocks.{index}", block)
    return Chain(model.patch_embed, tuple(steps), (model.stages[-1].norm, partial(_head_of_map, model)))


def _pvt_block(path: str, block: Any) -> list[Step]:
    attn, mlp, no_scale = _plain_pvt_block(path, block).attn, block.mlp, nn.Identity()
    for leaf, layer in (("attn.proj", attn.proj), ("mlp.fc2", mlp.fc2)):
        if not isinstance(layer, nn.Linear):
            raise not_prunable(f"{path}.{leaf}", layer, "expected a Linear layer")
    return [
        Branch(f"{path}.attn", "attention", block.norm1, partial(_run_on_map, attn), no_scale, attn.proj),
        Branch(f"{path}.mlp", "ffn", block.norm2, partial(_run_on_map, mlp), no_scale, mlp.fc2),
    ]


def _plain_pvt_block(path: str, block: Any) -> Any:
    """Return the block.

    Raises:
        BadInput: the block, its attention or its MLP is of an unknown class.
    """
    if type(block) is not pvt_v2.Block:
        raise not_prunable(path, block, "only timm's PVTv2 Block is supported")
    if original_class(type(block.attn)) is not pvt_v2.Attention:
        raise not_prunable(f"{path}.attn", block.attn, "only timm's PVTv2 Attention is supported")
    if original_class(type(block.mlp)) is not pvt_v2.MlpWithDepthwiseConv:
        raise not_prunable(f"{path}.mlp", block.mlp, "only timm's MLP with a depth-wise convolution is supported")
    return block


def _run_on_map(module: Any, feature_map: Tensor) -> Tensor:
    """Run a module that takes tokens (B, N, C) and their map size on a map (B, H, W, C)."""
    added: Tensor = module(feature_map.flatten(1, 2), feature_map.shape[1:3])
    return added.view(feature_map.shape)


def _next_stage(norm: nn.Module, downsample: nn.Module, feature_map: Tensor) -> Tensor:
    stream: Tensor = downsample(norm(feature_map).permute(0, 3, 1, 2))
    return stream


def _head_of_map(model: Any, feature_map: Tensor) -> Tensor:
    logits: Tensor = model.forward_head(feature_map.permute(0, 3, 1, 2))
    return logits


def _decoder(model: Any) -> Chain:
    """Build the chain of a causal language model; its logits are (B, tokens, vocabulary)."""
    steps: list[Step] = []
    for index, block in enumerate(model.blocks):
        path, mlp, no_scale = f"blocks.{index}", block.mlp, nn.Identity()
        attn = partial(block.attn, is_causal=True)
        steps += [
            Branch(f"{path}.attn", "attention", block.norm1, attn, no_scale, block.attn.proj),
            Branch(f"{path}.mlp", "ffn", block.norm2, mlp, no_scale, mlp.fc2, MlpLayers(mlp.fc1, mlp.act)),
        ]
    return Chain(model.embed, tuple(steps), (model.norm, model.head))


CHAINS: dict[type[nn.Module], Callable[[Any], Chain]] = {
    VisionTransformer: _vit,
    VisionTransformerDistilled: _vit,
    SwinTransformer: _swin,
    pvt_v2.PyramidVisionTransformerV2: _pvt,
    Decoder: _decoder,
}
