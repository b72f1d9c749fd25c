"""Find the prunable groups of a model, record its structure and resize a model to a structure.

The only package that depends on architectures by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprune.architectures import (
    block_removal,
    branch_removal,
    pvt,
    residual_stream,
    token_merging,
    traced_groups,
    unstructured,
    unstructured_tables,
    vit,
)
from vitprune.architectures.causal_lm import Decoder
from vitprune.architectures.narrow_attention import TwoWidthAttention
from vitprune.architectures.size_attributes import Sizes
from vitprune.architectures.tracing.fingerprint import unchanged
from vitprune.config.prune_config import APART, KINDS
from vitprune.errors import BadInput
from vitprune.groups import SUFFIXES, Group, recorded_shapes, resize_group
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.input_size import set_input_size
from vitprune.runtime.wrappers import plain_model

Cut = tuple[Group, tuple[int, ...]]

VISION_TRANSFORMERS = (VisionTransformer, VisionTransformerDistilled)
STREAMS: dict[type[nn.Module], dict[str, str]] = {  # names of residual groups, by a layer that writes them
    **{family: {r"patch_embed\.proj": "residual"} for family in VISION_TRANSFORMERS},
    Decoder: {"token_embed": "residual"},
    SwinTransformer: {
        r"patch_embed\.proj": "layers.0.residual",
        r"layers\.(\d+)\.downsample\.reduction": r"layers.\1.residual",
    },
    PyramidVisionTransformerV2: {
        r"patch_embed\.proj": "stages.0.residual",
        r"stages\.(\d+)\.downsample\.proj": r"stages.\1.residual",
        r"stages\.\d+\.blocks\.\d+\.attn\.sr": r"\g<0>",  # the channels of its reduced map
    },
}
UNITS = ".units"  # end of the name of some groups of hidden units in files of earlier versions
HEADS = SUFFIXES["head"]  # end of the name of a group of heads
OF_PARTS = tuple(SUFFIXES[kind] for kind in APART)  # ends of the names of groups of these kinds


@check_arguments()
def find_groups(model: nn.Module, kinds: Sequence[str], example_input: Tensor | None = None) -> list[Group]:
    """Find all prunable groups of the given kinds in a model.

    Args:
        model: A timm model, a `Decoder`, or any other model of images. A model that has no image size is traced with
            images of 3 x 224 x 224 pixels.
        kinds: Kinds of units: weight, ffn, attention (or qk, vo), head, residual, block, branch.
        example_input: Images (B, C, H, W) of the size at which a model that is not timm's is traced; the model keeps
            the size for later calls.

    Returns:
        The groups kind by kind, in the order of the model's layers.

    Raises:
        BadInput: a kind is unknown, or the model or one of its modules does not support it; the message names it.
    """
    model = plain_model(model)
    set_input_size(model, example_input)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadInput(f"kind {unknown[0]!r}: unknown; use some of {', '.join(KINDS)}")
    with unchanged(model):
        groups = [group for kind in kinds for group in _find(model, kind)]
    _refuse_shared(model, groups)
    return groups


def _refuse_shared(model: nn.Module, groups: Sequence[Group]) -> None:
    """Refuse groups that name one parameter in two ways: blocks that share a layer, whose weights would count twice."""
    names: dict[nn.Parameter, str] = {}
    for part in (part for group in groups for part in group.slices):
        first = names.setdefault(model.get_parameter(part.param), part.param)
        if first != part.param:
            raise BadInput(traced_groups.same_parameter(part.param, first))


def _find(model: nn.Module, kind: str) -> list[Group]:
    if kind == "branch":
        return branch_removal.groups(model)
    if kind == "block":
        return [vit.sublayers(model)] if removes_sublayers(model) else block_removal.groups(model)
    if kind in traced_groups.KINDS:
        return traced_groups.groups(model, kind)
    if kind == "residual":
        is_hybrid = hasattr(getattr(model, "patch_embed", None), "backbone")  # with streams of a convolutional network
        return residual_stream.groups(model, {} if is_hybrid else STREAMS.get(type(model), {}))
    return unstructured.single_weights(model, unstructured_tables.RECIPES.get(type(model), unstructured.ANY_LAYERS))


def removes_sublayers(model: nn.Module) -> bool:
    """Return whether kind `block` removes half-blocks (attention or MLP) of a model; else it removes whole blocks."""
    if type(model) not in VISION_TRANSFORMERS:
        return type(model) is Decoder
    return vit.has_plain_blocks(model, (branch_removal.ZeroBranch, TwoWidthAttention))


@check_arguments()
def merge_heads(model: nn.Module, groups: Sequence[Group], number: int | None) -> list[Group]:
    """Merge the heads of all attention groups.

    Args:
        model: The model.
        groups: Groups of any kind; only those of kind attention change.
        number: Number of heads after merging; None for no merging.

    Returns:
        The groups; those of kind attention have fewer heads with more channels.

    Raises:
        BadInput: the number does not divide a number of heads, or each head has its own parameters.

    Source: UP-ViTs, merging h_b heads into h_t.
    """
    model = plain_model(model)
    return [traced_groups.merge_heads(model, group, number) if number else group for group in groups]


def structure(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all groups that can be cut, removed modules and merged tokens, for `resize_to_structure`.

    Args:
        model: Any model.

    Returns:
        Shape by name of group. Heads whose channels are a group too are recorded with these channels.
    """
    with unchanged(model):
        blocks = _cuttable(model, "block") if removes_sublayers(model) else []
        attention = _cuttable(model, "attention")
        heads = _without_channels(_cuttable(model, "head"), attention)
        apart = _channels_apart(model) if removes_sublayers(model) else []
        groups = blocks + _cuttable(model, "residual") + attention + apart + heads + _cuttable(model, "ffn")
    recorded = {} if removes_sublayers(model) else recorded_shapes(model)  # which renames blocks
    inside = {f"{group.name}{HEADS}" for group in attention}
    modules = {path for path, _ in model.named_modules()}
    shapes = {name: shape for name, shape in recorded.items() if name not in inside and _of_module(name) in modules}
    shapes = {group.name: group.shape for group in groups} | shapes
    others = block_removal.removed_blocks(model) | branch_removal.removed_branches(model)
    return dict(sorted((others | token_merging.merged_tokens(model) | shapes).items()))


def _without_channels(heads: Sequence[Group], attention: Sequence[Group]) -> list[Group]:
    """Return the groups of heads whose channels are no group."""
    names = {group.name for group in attention}
    return [group for group in heads if group.name.removesuffix(HEADS) not in names]


def _channels_apart(model: nn.Module) -> list[Group]:
    """Return the groups of attentions whose queries and keys have another width than their values."""
    owners = {path for path, module in model.named_modules() if isinstance(module, TwoWidthAttention)}
    groups = [group for kind in APART for group in (_cuttable(model, kind) if owners else [])]
    return [group for group in groups if _of_module(group.name) in owners]


def _of_module(name: str) -> str:
    """Return the name of a group without its ending."""
    return next((name.removesuffix(ending) for ending in (HEADS, *OF_PARTS) if name.endswith(ending)), name)


def _cuttable(model: nn.Module, kind: str) -> list[Group]:
    try:
        return find_groups(model, [kind])
    except BadInput:  # the model has no such group, or it cannot be cut
        return []


def resize_to_structure(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[Cut]:
    """Cut a dense model to a recorded structure, in place.

    Args:
        model: The dense model.
        shapes: Shape by name of group, as returned by `structure`.

    Returns:
        The cuts made. `apply_cuts` repeats them on another model of the same shapes without a search for groups.

    Raises:
        BadInput: the structure names a group that the model does not have, or is larger than the model.
    """
    wanted = {name: tuple(shape) for name, shape in shapes.items()}
    cuts: list[Cut] = []
    reached: dict[str, tuple[int, ...]] = {}  # as `structure` would return it for the result
    widths = ("residual", "attention", "ffn", *(APART if any(name.endswith(OF_PARTS) for name in wanted) else ()))
    for kinds in (("block",), ("branch",), ("head",), widths) if wanted else ():
        if kinds == ("block",) and not removes_sublayers(model):
            cuts += apply_cuts(model, block_removal.cuts_of(model, wanted))
            reached |= block_removal.removed_blocks(model)
            continue
        if kinds == ("branch",):
            cuts += apply_cuts(model, branch_removal.branch_cuts(model, wanted))
            reached |= branch_removal.removed_branches(model)
            continue
        with unchanged(model):
            groups = [group for kind in kinds for group in _cuttable(model, kind)]
        reached |= {group.name: group.shape for group in groups}
        names = {group.name: _recorded_name(group, wanted) for group in groups}
        made = [(group, wanted[names[group.name]]) for group in groups if names[group.name]]
        made = [(_of_heads(model, group, shape), shape) for group, shape in made]
        if kinds == ("head",):
            made += _fewer_heads(groups, _cuttable(model, "attention"), wanted)
        made.sort(key=lambda cut: -max((part.start or 0 for part in cut[0].slices), default=0))  # the last rows first
        cuts += apply_cuts(model, made)
        reached |= {names[group.name] or group.name: shape for group, shape in made}
    cuts += apply_cuts(model, token_merging.merging_cuts(model, wanted))
    reached |= token_merging.merged_tokens(model)
    missing = [name for name in wanted if reached.get(name) != wanted[name]]
    now = structure(model) if missing else {}  # narrower attention can make residual streams separable
    for name in missing:
        if now.get(name) != wanted[name]:
            model_name = type(model).__name__
            raise BadInput(f"structure: {model_name} has no group {name} that could take the shape {[*wanted[name]]}")
    return cuts


def apply_cuts(model: nn.Module, cuts: Sequence[Cut]) -> Sequence[Cut]:
    """Cut groups of a model to smaller shapes, in place, keeping their first units; return the cuts.

    Raises:
        BadInput: a shape is larger than its group, or is empty.
    """
    for group, shape in cuts:
        resize_group(model, group, shape)
    return cuts


def _recorded_name(group: Group, wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of a group in a recorded structure, today's or an earlier one; empty if it is not recorded."""
    earlier = (f"{part.param.removesuffix('.weight')}{UNITS}" for part in group.slices if part.axis == 0)
    return next((name for name in (group.name, *earlier) if name in wanted), "")


def _of_heads(model: nn.Module, group: Group, shape: tuple[int, ...]) -> Group:
    """Return a group of attention channels with the number of heads of a recorded shape, if its heads can merge."""
    merges = group.kind == "attention" and len(shape) == 2 and shape[0] > 0 and group.shape[0] % shape[0] == 0
    return traced_groups.merge_heads(model, group, shape[0]) if merges else group


def _fewer_heads(
    heads: Sequence[Group], attention: Sequence[Group], wanted: Mapping[str, tuple[int, ...]]
) -> list[Cut]:
    """Return cuts of heads for every attention recorded with fewer heads that are not wider (merged) than before."""
    traced = {group.name: getattr(group.resize, "__self__", None) for group in heads}
    widths = {name: sizes.shape[1] for name, sizes in traced.items() if isinstance(sizes, Sizes)}
    widths |= {f"{group.name}{HEADS}": group.shape[1] for group in attention}
    cuts: list[Cut] = []
    for group in heads:
        number, *width = wanted.get(group.name.removesuffix(HEADS), ())[:2] or (0,)
        if group.name not in wanted and width and number < group.shape[0] and width[0] <= widths.get(group.name, 0):
            cuts.append((group, (number,)))
    return cuts


def uniform_args(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of timm.create_model that give a model of these shapes; empty if there are none."""
    if branch_removal.removed_branches(model):
        return {}
    if isinstance(model, PyramidVisionTransformerV2):
        return pvt.uniform_args(model)
    return vit.uniform_args(model) if isinstance(model, VisionTransformer) else {}
