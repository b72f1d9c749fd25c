"""Finding a model's groups: the only part that knows architectures by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientformer import EfficientFormer
from timm.models.efficientformer_v2 import EfficientFormerV2
from timm.models.efficientnet import EfficientNet
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import nn

from vitprune.errors import BadInput
from vitprune.families import layers, parts, prunable, pvt, swin, vit
from vitprune.families.decoder import Decoder
from vitprune.families.decoder import groups as decoder_groups
from vitprune.groups import KINDS, Group, cut_to

Finder = Callable[[nn.Module, str], list[Group]]

FAMILIES: dict[type[nn.Module], Finder] = {
    VisionTransformer: vit.groups,
    VisionTransformerDistilled: vit.groups,
    SwinTransformer: swin.groups,
    PyramidVisionTransformerV2: pvt.groups,
    Decoder: decoder_groups,
    Xcit: partial(layers.weights, prunable.XCIT),
    EfficientFormer: partial(layers.weights, prunable.EFFICIENTFORMER),
    EfficientFormerV2: partial(layers.weights, prunable.EFFICIENTFORMER_V2),
    ConvNeXt: partial(layers.weights, prunable.CONVNEXT),
    ResNet: partial(layers.weights, prunable.RESNET),
    EfficientNet: partial(layers.weights, prunable.EFFICIENTNET),
}


def find_groups(model: nn.Module, kinds: Sequence[str]) -> list[Group]:
    """Find all groups of the given kinds in a timm model, in the order of its layers.

    Raises:
        BadInput: a kind is unknown, or the model or one of its modules is not understood; it is named.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadInput(f"kind {unknown[0]!r}: unknown; use some of {', '.join(KINDS)}")
    finder = FAMILIES.get(type(model))
    if finder is None:
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise BadInput(f"{type(model).__name__}: this model is not supported yet; supported are {known}")
    return [group for kind in kinds for group in finder(model, kind)]


def merge_heads(model: nn.Module, groups: Sequence[Group], number: int | None) -> list[Group]:
    """Read attention groups as `number` merged heads (UP-ViTs); None leaves them as they are."""
    return [parts.merge_heads(model, group, number) if number else group for group in groups]


def structure(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every group that can be cut, by name: all that is needed to rebuild a shrunk model."""
    heads = _cuttable(model, "attention") or _cuttable(model, "head")
    found = _cuttable(model, "block") + _cuttable(model, "residual") + heads + _cuttable(model, "ffn")
    return {group.name: group.shape for group in found}


def _cuttable(model: nn.Module, kind: str) -> list[Group]:
    try:
        return find_groups(model, [kind])
    except BadInput:  # a kind that this model cannot lose has kept its size
        return []


def rebuild(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Cut a dense model to a recorded structure, in place; what its weights are afterwards does not matter.

    Raises:
        BadInput: the structure names a group that the model does not have, or is larger than the model.
    """
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    for kind in ("block", "head", "residual", "attention", "ffn"):
        if not wanted or structure(model) == wanted:
            break
        for group in _cuttable(model, kind):
            if kind == "head":
                _cut_heads(model, group, wanted)
            elif group.name in wanted:
                cut_to(model, group, wanted[group.name])
    lost = {name: shape for name, shape in wanted.items() if structure(model).get(name) != shape}
    if lost:
        name, shape = next(iter(lost.items()))
        raise BadInput(f"structure: {type(model).__name__} has no group {name} that could take the shape {list(shape)}")
    return model


def _cut_heads(model: nn.Module, group: Group, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Cut whole heads where the recorded attention has fewer of them and none is wider (merged) than before."""
    if group.name in wanted:  # its channels cannot be cut, so its heads are what was recorded
        cut_to(model, group, wanted[group.name])
        return
    number, width = wanted[group.owner] if len(wanted.get(group.owner, ())) == 2 else (group.shape[0], 0)
    if number < group.shape[0] and width <= parts.head_dim(model.get_submodule(group.owner)):
        cut_to(model, group, (number,))


def uniform_args(model: nn.Module) -> dict[str, Any]:
    """Arguments of timm.create_model that give the model's shapes, empty where none do."""
    if isinstance(model, PyramidVisionTransformerV2):
        return pvt.uniform_args(model)
    return vit.uniform_args(model) if isinstance(model, VisionTransformer) else {}
