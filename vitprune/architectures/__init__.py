"""Finding a model's groups: the only part that knows architectures by name."""

from collections.abc import Callable, Mapping, Sequence
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

from vitprune.architectures import (
    attention,
    block_removal,
    by_module,
    pvt,
    residual_stream,
    swin,
    unstructured,
    unstructured_tables,
    vit,
)
from vitprune.architectures.causal_lm import Decoder
from vitprune.architectures.causal_lm import groups as decoder_groups
from vitprune.errors import BadInput
from vitprune.groups import KINDS, Group, resize_group

Finder = Callable[[nn.Module, str], list[Group]]
Cut = tuple[Group, tuple[int, ...]]

FAMILIES: dict[type[nn.Module], Finder] = {  # those of which more is known than their parts
    VisionTransformer: vit.groups,
    VisionTransformerDistilled: vit.groups,
    SwinTransformer: swin.groups,
    PyramidVisionTransformerV2: pvt.groups,
    Decoder: decoder_groups,
}
HALVED = (VisionTransformer, VisionTransformerDistilled, Decoder)  # whose blocks go in halves; others are skipped whole
TABLES: dict[type[nn.Module], unstructured.Table] = {
    Xcit: unstructured_tables.XCIT,
    EfficientFormer: unstructured_tables.EFFICIENTFORMER,
    EfficientFormerV2: unstructured_tables.EFFICIENTFORMER_V2,
    ConvNeXt: unstructured_tables.CONVNEXT,
    ResNet: unstructured_tables.RESNET,
    EfficientNet: unstructured_tables.EFFICIENTNET,
}


def find_groups(model: nn.Module, kinds: Sequence[str]) -> list[Group]:
    """Find all groups of the given kinds in a timm model, in the order of its layers.

    Hidden units, heads and channels of heads are found part by part, in whatever model the parts are.

    Raises:
        BadInput: a kind is unknown, or the model or one of its modules is not understood; it is named.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadInput(f"kind {unknown[0]!r}: unknown; use some of {', '.join(KINDS)}")
    return [group for kind in kinds for group in _find(model, kind)]


def _find(model: nn.Module, kind: str) -> list[Group]:
    if kind == "block" and type(model) not in HALVED:
        return block_removal.groups(model)
    if type(model) in FAMILIES:
        return FAMILIES[type(model)](model, kind)
    if kind in by_module.KINDS:
        return by_module.groups(model, kind)
    if kind == "residual":
        return residual_stream.groups(model)
    if type(model) in TABLES:
        return unstructured.weights(TABLES[type(model)], model)
    return unstructured.all_weights(model)


def merge_heads(model: nn.Module, groups: Sequence[Group], number: int | None) -> list[Group]:
    """Read attention groups as `number` merged heads (UP-ViTs); None leaves them as they are."""
    return [attention.merge_heads(model, group, number) if number else group for group in groups]


def structure(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every group that can be cut, by name, and every skipped block: all that rebuilds a shrunk model."""
    blocks = _cuttable(model, "block") if type(model) in HALVED else []
    heads = _cuttable(model, "attention") or _cuttable(model, "head")
    found = blocks + _cuttable(model, "residual") + heads + _cuttable(model, "ffn")
    return block_removal.recorded(model) | {group.name: group.shape for group in found}


def _cuttable(model: nn.Module, kind: str) -> list[Group]:
    try:
        return find_groups(model, [kind])
    except BadInput:  # a kind that this model cannot lose has kept its size
        return []


def rebuild(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Cut a dense model to a recorded structure, in place; what its weights are afterwards does not matter.

    Raises:
        BadInput: as of `cut_down`.
    """
    resize_to_structure(model, shapes)
    return model


def resize_to_structure(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[Cut]:
    """Cut a dense model to a recorded structure, in place, and tell the cuts.

    The same cuts by `recut` make the same of another model of the same shapes, which need not be looked at again.

    Raises:
        BadInput: the structure names a group that the model does not have, or is larger than the model.
    """
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    cuts: list[Cut] = []
    for kind in ("block", "head", "residual", "attention", "ffn") if wanted else ():
        if kind == "block" and type(model) not in HALVED:
            cuts += apply_cuts(model, block_removal.cuts(model, wanted))
            continue
        found = _cuttable(model, kind)
        if kind == "head":
            cuts += apply_cuts(model, _fewer_heads(model, found, wanted))
        else:
            cuts += apply_cuts(model, [(group, wanted[group.name]) for group in found if group.name in wanted])
    found_shapes = structure(model) if wanted else {}
    lost = {name: shape for name, shape in wanted.items() if found_shapes.get(name) != shape}
    if lost:
        name, shape = next(iter(lost.items()))
        raise BadInput(f"structure: {type(model).__name__} has no group {name} that could take the shape {list(shape)}")
    return cuts


def apply_cuts(model: nn.Module, cuts: Sequence[Cut]) -> Sequence[Cut]:
    """Give groups of a model their smaller shapes, in place, keeping their first units; the cuts themselves.

    Raises:
        BadInput: a shape is larger than its group, or has nothing in it.
    """
    for group, shape in cuts:
        resize_group(model, group, shape)
    return cuts


def _fewer_heads(model: nn.Module, found: Sequence[Group], wanted: Mapping[str, tuple[int, ...]]) -> list[Cut]:
    """Cuts of whole heads where the recorded attention has fewer of them and none is wider (merged) than before."""
    widths = {group.name: group.shape[1] for group in _cuttable(model, "attention")}
    cuts: list[Cut] = []
    for group in found:
        if group.name in wanted:  # its channels cannot be cut, so its heads are what was recorded
            cuts.append((group, wanted[group.name]))
        elif len(wanted.get(group.owner, ())) == 2:
            number, width = wanted[group.owner]
            if number < group.shape[0] and width <= widths[group.owner]:
                cuts.append((group, (number,)))
    return cuts


def uniform_args(model: nn.Module) -> dict[str, Any]:
    """Arguments of timm.create_model that give the model's shapes, empty where none do."""
    if isinstance(model, PyramidVisionTransformerV2):
        return pvt.uniform_args(model)
    return vit.uniform_args(model) if isinstance(model, VisionTransformer) else {}
