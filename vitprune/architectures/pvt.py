"""Groups of timm's PyramidVisionTransformerV2 (PVTv2), with and without linear attention."""

from functools import partial
from typing import Any

from timm.models.pvt_v2 import Attention, Block, MlpWithDepthwiseConv

from vitprune.architectures.block_removal import IdentityBlock
from vitprune.architectures.branch_removal import ZeroBranch
from vitprune.architectures.inferred_widths import original_class
from vitprune.architectures.residual_stream import after_trial, group_along
from vitprune.architectures.slices import block_weights, not_prunable
from vitprune.architectures.tracing.cache import traced_channels
from vitprune.groups import Group

BLOCK_LINEARS = {"attn.q": "qkv", "attn.kv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}


def groups(model: Any, kind: str) -> list[Group]:
    """Find all groups of kind residual or weight; single weights of convolutions are not pruned.

    Every stage has one group of residual channels. Every attention with spatial reduction has another one, the channels
    of its reduced map, which has a LayerNorm of its own. If all of them are pruned to the same sparsity, the result has
    the shapes of a timm model.

    Raises:
        BadInput: a block, attention or MLP is of an unknown class, or a residual stream cannot be pruned.
    """
    blocks = [
        (f"stages.{number}.blocks.{index}", plain(f"stages.{number}.blocks.{index}", block))
        for number, stage in enumerate(model.stages)
        for index, block in enumerate(stage.blocks)
        if type(block) is not IdentityBlock
    ]
    if kind == "residual":
        writers = ["patch_embed.proj", *(f"stages.{index}.downsample.proj" for index in range(1, len(model.stages)))]
        reductions = [f"{path}.attn" for path, block in blocks if getattr(block.attn, "sr", None) is not None]
        channels = traced_channels(model)
        streams = [
            group_along(channels, f"stages.{index}.residual", f"{writer}.weight", 0, partial(_resize_stream, index))
            for index, writer in enumerate(writers)
        ] + [group_along(channels, f"{path}.sr", f"{path}.sr.weight", 0, owner=path) for path in reductions]
        return after_trial(model, streams)
    return block_weights(blocks, BLOCK_LINEARS)


def uniform_args(model: Any) -> dict[str, Any]:
    """Return the arguments of timm.create_model for this model; empty if the blocks of a stage differ."""
    stages = [{_shape(block) for block in stage.blocks} for stage in model.stages]
    if any(len(shapes) != 1 or None in shapes for shapes in stages):
        return {}
    widths, heads, hidden, ratios = zip(*(shapes.pop() for shapes in stages), strict=True)
    mlp_ratios = [units / width for units, width in zip(hidden, widths, strict=True)]
    if any(int(width * ratio) != units for width, ratio, units in zip(widths, mlp_ratios, hidden, strict=True)):
        return {}
    depths = [len(stage.blocks) for stage in model.stages]
    shape = {"embed_dims": list(widths), "depths": depths, "num_heads": list(heads)}
    return shape | {"mlp_ratios": mlp_ratios, "sr_ratios": list(ratios)}


def plain(path: str, block: Any) -> Any:
    """Return the block.

    Raises:
        BadInput: the block, its attention or its MLP is of an unknown class.
    """
    if type(block) is not Block:
        raise not_prunable(path, block, "only timm's PVTv2 Block is supported")
    if original_class(type(block.attn)) not in (Attention, ZeroBranch):
        raise not_prunable(f"{path}.attn", block.attn, "only timm's PVTv2 Attention is supported")
    if original_class(type(block.mlp)) not in (MlpWithDepthwiseConv, ZeroBranch):
        raise not_prunable(f"{path}.mlp", block.mlp, "only timm's MLP with a depth-wise convolution is supported")
    return block


def _shape(block: Any) -> tuple[int, int, int, int] | None:
    """Width, heads, hidden units and reduction ratio of a block whose attention has one width."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return None
    attn = block.attn
    ratio = 1 if attn.sr is None else attn.sr.kernel_size[0]
    return attn.q.in_features, attn.num_heads, block.mlp.fc1.out_features, ratio


def _resize_stream(index: int, model: Any, shape: tuple[int, ...]) -> None:
    """Record a new width of the residual stream of a stage."""
    model.feature_info[index]["num_chs"] = shape[0]
    for block in model.stages[index].blocks:
        if type(block) is not IdentityBlock and type(block.attn) is not ZeroBranch:
            block.attn.dim = shape[0]
    if index + 1 == len(model.stages):
        model.num_features = model.head_hidden_size = shape[0]
