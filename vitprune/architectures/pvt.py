"""Groups of timm's PyramidVisionTransformerV2 (PVTv2), with and without its linear attention."""

from functools import partial
from typing import Any

from timm.models.pvt_v2 import Attention, Block, MlpWithDepthwiseConv

from vitprune.architectures import by_module, parts
from vitprune.architectures.block_removal import IdentityBlock
from vitprune.architectures.pvt_attention import CutAttention, set_pvt_forward_class
from vitprune.groups import Group

PRUNABLE = {"attn.q": "qkv", "attn.kv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}


def groups(model: Any, kind: str) -> list[Group]:
    """All groups of one kind; convolutions keep every single weight, as the patch embedding of a ViT does.

    Residual groups are one stream per stage and, of every attention that reduces its map, the channels of the reduced
    map: a space of its own, under a LayerNorm of its own. Cut all of them by the same share and timm's shapes are left.

    Raises:
        BadInput: a block, attention, MLP or norm of the model is of a type that is not understood.
    """
    blocks = [
        (f"stages.{number}.blocks.{index}", plain(f"stages.{number}.blocks.{index}", block))
        for number, stage in enumerate(model.stages)
        for index, block in enumerate(stage.blocks)
        if type(block) is not IdentityBlock
    ]
    if kind == "residual":
        streams = [_stream(model, number) for number in range(len(model.stages))]
        return streams + [_reduction(f"{path}.attn", b.attn) for path, b in blocks if b.attn.sr is not None]
    if kind == "weight":
        return [group for path, block in blocks for group in parts.weights(path, block, PRUNABLE)]
    return by_module.groups(model, kind)


def uniform_args(model: Any) -> dict[str, Any]:
    """Arguments of timm.create_model for a model whose blocks are alike within each stage, else nothing."""
    stages = [{_shape(block) for block in stage.blocks} for stage in model.stages]
    if any(len(shapes) != 1 or None in shapes for shapes in stages):
        return {}
    widths, heads, hidden, ratios = zip(*(shapes.pop() for shapes in stages), strict=True)
    mlp = [units / width for units, width in zip(hidden, widths, strict=True)]
    if any(int(width * ratio) != units for width, ratio, units in zip(widths, mlp, hidden, strict=True)):
        return {}
    depths = [len(stage.blocks) for stage in model.stages]
    shape = {"embed_dims": list(widths), "depths": depths, "num_heads": list(heads)}
    return shape | {"mlp_ratios": mlp, "sr_ratios": list(ratios)}


def _shape(block: Any) -> tuple[int, int, int, int] | None:
    """Width, heads, hidden units and reduction ratio of a block in timm's own shape."""
    if type(block) is not Block:
        return None
    attn = block.attn
    if type(attn) is not Attention:
        return None
    ratio = 1 if attn.sr is None else attn.sr.kernel_size[0]
    return attn.dim, attn.num_heads, block.mlp.fc1.out_features, ratio


def plain(path: str, block: Any) -> Any:
    """The block itself.

    Raises:
        BadInput: it, its attention or its MLP is of a type that is not understood.
    """
    if type(block) is not Block:
        raise parts.refuse(path, block, "only timm's PVTv2 Block is understood here")
    if type(block.attn) not in (Attention, CutAttention):
        raise parts.refuse(f"{path}.attn", block.attn, "only timm's PVTv2 Attention is understood here")
    if type(block.mlp) is not MlpWithDepthwiseConv:
        raise parts.refuse(f"{path}.mlp", block.mlp, "only timm's MLP with a depth-wise convolution is understood here")
    return block


def _reduction(path: str, attn: Any) -> Group:
    """Channels of the reduced map that keys and values read: rows of sr, its norm, columns of kv."""
    found = parts.slices(attn.sr, f"{path}.sr", 0) + parts.norm(attn.norm, f"{path}.norm")
    found += parts.slices(attn.kv, f"{path}.kv", 1)
    return Group(f"{path}.sr", "residual", (attn.sr.out_channels,), found, owner=path, resize=_resize_reduction)


def _resize_reduction(attn: Any, shape: tuple[int, ...]) -> None:
    set_pvt_forward_class(attn)


def _stream(model: Any, number: int) -> Group:
    """Channels of one stage's residual stream, from its patch embedding to the next one, or to the head."""
    path, last = f"stages.{number}", number + 1 == len(model.stages)
    entry = f"{path}.downsample" if number else "patch_embed"
    writers, norms = [f"{entry}.proj"], [f"{entry}.norm", f"{path}.norm"]
    readers = ["head" if last else f"stages.{number + 1}.downsample.proj"]
    for index, block in enumerate(model.stages[number].blocks):
        if type(block) is IdentityBlock:
            continue
        inside = f"{path}.blocks.{index}"
        writers += [f"{inside}.attn.proj", f"{inside}.mlp.fc2"]
        readers += [f"{inside}.attn.q", f"{inside}.mlp.fc1", f"{inside}.attn.{'kv' if block.attn.sr is None else 'sr'}"]
        norms += [f"{inside}.norm1", f"{inside}.norm2"]
    found = parts.stream(model, writers, readers, norms)
    width = model.get_submodule(entry).proj.out_channels
    return Group(f"{path}.residual", "residual", (width,), found, resize=partial(_resize_stream, number))


def _resize_stream(number: int, model: Any, shape: tuple[int, ...]) -> None:
    model.feature_info[number]["num_chs"] = shape[0]
    for block in model.stages[number].blocks:
        if type(block) is not IdentityBlock:
            set_pvt_forward_class(block.attn)
    if number + 1 == len(model.stages):
        model.num_features = model.head_hidden_size = shape[0]
