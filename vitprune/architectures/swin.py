"""Groups of timm's SwinTransformer."""

from functools import partial
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from vitprune.architectures.residual_stream import after_trial, group_along
from vitprune.architectures.slices import block_weights, not_prunable
from vitprune.architectures.tracing.cache import traced_channels
from vitprune.groups import Group


def groups(model: Any, kind: str) -> list[Group]:
    """Find all groups of kind residual or weight; every stage has one group of residual channels.

    Raises:
        BadInput: a residual stream cannot be pruned.
    """
    if kind == "residual":
        return after_trial(model, _streams(model))
    return block_weights(
        (name, block) for name, block in model.named_modules() if isinstance(block, SwinTransformerBlock)
    )


def _streams(model: Any) -> list[Group]:
    if isinstance(model.head.fc, nn.Linear) and model.head.fc.in_features != model.num_features:
        raise not_prunable("head", model.head, "it reads several pools side by side")
    writers = ["patch_embed.proj", *(f"layers.{index}.downsample.reduction" for index in range(1, len(model.layers)))]
    channels = traced_channels(model)
    return [
        group_along(channels, f"layers.{index}.residual", f"{writer}.weight", 0, partial(_resize_stream, index))
        for index, writer in enumerate(writers)
    ]


def _resize_stream(index: int, model: Any, shape: tuple[int, ...]) -> None:
    """Record a new width of the residual stream of a stage."""
    width = shape[0]
    model.feature_info[index]["num_chs"] = width
    if index == 0:
        model.embed_dim = width
    else:
        model.layers[index].downsample.out_dim = width
    if index + 1 < len(model.layers):
        model.layers[index + 1].downsample.dim = width
    else:
        model.num_features = model.head_hidden_size = model.head.in_features = model.head.num_features = width
