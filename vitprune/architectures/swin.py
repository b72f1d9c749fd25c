"""Groups of timm's SwinTransformer."""

from functools import partial
from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import nn

from vitprune.architectures import by_module, parts
from vitprune.architectures.block_removal import IdentityBlock
from vitprune.groups import Group, ParamSlice


def groups(model: Any, kind: str) -> list[Group]:
    """All groups of one kind, those of its parts among them; residual channels are one group per stage.

    Raises:
        BadInput: a block, MLP or norm is of a type that is not understood.
    """
    blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, SwinTransformerBlock)]
    for path, block in blocks:
        if type(block.mlp) is not Mlp:
            raise parts.refuse(f"{path}.mlp", block.mlp, "only timm's plain Mlp is understood here")
    if kind == "residual":
        return [_stream(model, number) for number in range(len(model.layers))]
    if kind in by_module.KINDS:
        return by_module.groups(model, kind)
    return [group for path, block in blocks for group in parts.weights(path, block)]


def _stream(model: Any, number: int) -> Group:
    """Channels of one stage's residual stream, from its embedding or merging to the next merging, or to the head."""
    path, last = f"layers.{number}", number + 1 == len(model.layers)
    if last and isinstance(model.head.fc, nn.Linear) and model.head.fc.in_features != model.num_features:
        raise parts.refuse("head", model.head, "it reads several pools side by side")
    writers, norms = (
        (["patch_embed.proj"], ["patch_embed.norm"]) if number == 0 else ([f"{path}.downsample.reduction"], [])
    )
    readers = ["head.fc"] if last else []
    for index, block in enumerate(model.layers[number].blocks):
        if type(block) is IdentityBlock:
            continue
        inside = f"{path}.blocks.{index}"
        writers += [f"{inside}.attn.proj", f"{inside}.mlp.fc2"]
        readers += [f"{inside}.attn.qkv", f"{inside}.mlp.fc1"]
        norms += [f"{inside}.norm1", f"{inside}.norm2"]
    found = parts.stream(model, writers, readers, [*norms, "norm"] if last else norms)
    if not last:
        found += _merged(f"layers.{number + 1}.downsample", model.layers[number + 1].downsample)
    width = model.get_submodule(writers[0]).weight.shape[0]
    return Group(f"{path}.residual", "residual", (width,), found, resize=partial(_resize_stream, number))


def _merged(path: str, merging: Any) -> tuple[ParamSlice, ...]:
    """A stage's channels in the patch merging behind it, which reads those of four neighbours side by side."""
    if type(merging) is not PatchMerging:
        raise parts.refuse(path, merging, "only timm's PatchMerging is understood between stages")
    return parts.norm(merging.norm, f"{path}.norm", outer=4) + parts.slices(
        merging.reduction, f"{path}.reduction", 1, 4
    )


def _resize_stream(number: int, model: Any, shape: tuple[int, ...]) -> None:
    width = shape[0]
    model.feature_info[number]["num_chs"] = width
    if number == 0:
        model.embed_dim = width
    else:
        model.layers[number].downsample.out_dim = width
    if number + 1 < len(model.layers):
        model.layers[number + 1].downsample.dim = width
    else:
        model.num_features = model.head_hidden_size = model.head.in_features = model.head.num_features = width
