"""Residual groups written out by hand per architecture, for comparison with those that the tracer finds."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from vitprune.groups import ParamSlice

TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")


def vit(model: Any) -> dict[str, tuple[int, set[ParamSlice]]]:
    """Return name, number of units and slices of the residual stream of a VisionTransformer."""
    result: set[ParamSlice] = set()
    for path, module in model.named_modules():
        if path == "patch_embed.proj" or path.endswith((".attn.proj", ".mlp.fc2")):
            result |= slices(module, path, 0)
        if path.endswith((".attn.qkv", ".mlp.fc1")) or (
            path in ("head", "head_dist") and isinstance(module, nn.Linear)
        ):
            result |= slices(module, path, 1)
        elif isinstance(module, nn.LayerNorm) and ".attn." not in path and ".mlp." not in path:
            result |= slices(module, path, 0)
        elif type(module).__name__ == "LayerScale":
            result.add(ParamSlice(f"{path}.gamma", 0))
    result |= {ParamSlice(name, 2) for name in TOKENS if getattr(model, name, None) is not None}
    return {"residual": (model.embed_dim, result)}


def decoder(model: Any) -> dict[str, tuple[int, set[ParamSlice]]]:
    """Return the same for a causal language model."""
    result = {ParamSlice("token_embed.weight", 1), ParamSlice("pos_embed", 2)}
    result |= slices(model.norm, "norm", 0) | slices(model.head, "head", 1)
    for index, block in enumerate(model.blocks):
        result |= in_block(f"blocks.{index}", block, ("attn.qkv", "mlp.fc1"))
    return {"residual": (model.embed_dim, result)}


def swin(model: Any) -> dict[str, tuple[int, set[ParamSlice]]]:
    """Return the same for the stages of a Swin; patch merging reads four neighbors side by side."""
    result = {}
    for number, stage in enumerate(model.layers):
        name = f"layers.{number}"
        if number == 0:
            selected = slices(model.patch_embed.proj, "patch_embed.proj", 0)
            selected |= slices(model.patch_embed.norm, "patch_embed.norm", 0)
        else:
            selected = slices(stage.downsample.reduction, f"{name}.downsample.reduction", 0)
        for index, block in enumerate(stage.blocks):
            selected |= in_block(f"{name}.blocks.{index}", block, ("attn.qkv", "mlp.fc1"))
        if number + 1 == len(model.layers):
            selected |= slices(model.norm, "norm", 0) | slices(model.head.fc, "head.fc", 1)
        else:
            merging, path = model.layers[number + 1].downsample, f"layers.{number + 1}.downsample"
            selected |= slices(merging.norm, f"{path}.norm", 0, 4) | slices(
                merging.reduction, f"{path}.reduction", 1, 4
            )
        result[f"{name}.residual"] = (stage.blocks[0].attn.qkv.in_features, selected)
    return result


def pvt(model: Any) -> dict[str, tuple[int, set[ParamSlice]]]:
    """Return the same for the stages of a PVTv2 and the reduced map of every attention that has one."""
    result = {}
    for number, stage in enumerate(model.stages):
        name = f"stages.{number}"
        path, entry = (f"{name}.downsample", stage.downsample) if number else ("patch_embed", model.patch_embed)
        selected = slices(entry.proj, f"{path}.proj", 0) | slices(entry.norm, f"{path}.norm", 0)
        selected |= slices(stage.norm, f"{name}.norm", 0)
        for index, block in enumerate(stage.blocks):
            keys = "kv" if block.attn.sr is None else "sr"
            selected |= in_block(f"{name}.blocks.{index}", block, ("attn.q", f"attn.{keys}", "mlp.fc1"))
        if number + 1 == len(model.stages):
            selected |= slices(model.head, "head", 1)
        else:
            selected |= slices(model.stages[number + 1].downsample.proj, f"stages.{number + 1}.downsample.proj", 1)
        result[f"{name}.residual"] = (entry.proj.out_channels, selected)
    return result | dict(reductions(model))


def reductions(model: Any) -> Iterator[tuple[str, tuple[int, set[ParamSlice]]]]:
    for number, stage in enumerate(model.stages):
        for index, block in enumerate(stage.blocks):
            attn, path = block.attn, f"stages.{number}.blocks.{index}.attn"
            if attn.sr is not None:
                selected = slices(attn.sr, f"{path}.sr", 0) | slices(attn.norm, f"{path}.norm", 0)
                yield f"{path}.sr", (attn.sr.out_channels, selected | slices(attn.kv, f"{path}.kv", 1))


def in_block(path: str, block: nn.Module, readers: tuple[str, ...]) -> set[ParamSlice]:
    result = slices(block.norm1, f"{path}.norm1", 0) | slices(block.norm2, f"{path}.norm2", 0)
    for leaf in ("attn.proj", "mlp.fc2"):
        result |= slices(block.get_submodule(leaf), f"{path}.{leaf}", 0)
    for leaf in readers:
        result |= slices(block.get_submodule(leaf), f"{path}.{leaf}", 1)
    return result


def slices(layer: Any, path: str, axis: int, outer: int = 1) -> set[ParamSlice]:
    names = [leaf for leaf, _ in layer.named_parameters() if axis == 0 or leaf == "weight"]
    return {ParamSlice(f"{path}.{leaf}", axis, outer) for leaf in names}
