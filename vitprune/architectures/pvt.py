"""Arguments with which timm creates a pruned PyramidVisionTransformerV2 (PVTv2)."""

from typing import Any

from timm.models.pvt_v2 import Attention, Block


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


def _shape(block: Any) -> tuple[int, int, int, int] | None:
    """Width, heads, hidden units and reduction ratio of a block whose attention has one width."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return None
    attn = block.attn
    ratio = 1 if attn.sr is None else attn.sr.kernel_size[0]
    return attn.q.in_features, attn.num_heads, block.mlp.fc1.out_features, ratio
