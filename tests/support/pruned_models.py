"""Pruned variants of the model zoo, with another width in every block: for timm's interfaces and the exporters."""

import copy
import functools
from collections.abc import Mapping, Sequence

import timm
import torch
from torch import nn

from tests.support.model_zoo import ZOO, random_masks, redrawn
from vitprune import find_groups, shrink
from vitprune.architectures import resize_to_structure

DEEP = {"depth": 4}
DEIT3 = {"init_values": 0.1, "no_embed_class": True}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", ZOO["vit"][1] | DEEP),
    "distilled": ("deit_tiny_distilled_patch16_224", ZOO["distilled"][1] | DEEP),
    "deit3": ("deit3_small_patch16_224", ZOO["vit"][1] | DEEP | DEIT3),
    "registers": ("vit_tiny_patch16_224", ZOO["extra"][1] | DEEP),
    "swin": ZOO["swin"],
    "pvt": ZOO["pvt"],
    "pvt-linear": ZOO["pvt-linear"],
}
CUTS = {
    "units": ("ffn", "attention"),
    "heads": ("head", "ffn"),
    "stream": ("residual", "attention", "ffn"),
    "blocks": ("block", "residual", "head"),
}
EVERYTHING = ("head", "attention", "ffn", "residual")
TRANSFORMERS = ("vit", "distilled", "deit3", "registers")  # whole blocks can be removed
CASES = [(family, cut) for family in FAMILIES for cut in CUTS if cut != "blocks" or family in TRANSFORMERS]


def dense_of(family: str) -> nn.Module:
    """Return a dense model in float32."""
    return copy.deepcopy(_dense(family))


@functools.cache
def _dense(family: str) -> nn.Module:
    architecture, args = FAMILIES[family]
    return redrawn(timm.create_model(architecture, **args), 0)


def rebuild(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Cut a dense model to a recorded structure, in place, and return it."""
    resize_to_structure(model, shapes)
    return model


def masks_of(groups: list) -> dict[str, torch.Tensor]:
    """Return masks that remove another number of units from every group; the block masks leave a hybrid block."""
    masks = {}
    for index, group in enumerate(groups):
        if group.kind == "block":
            masks[group.name] = torch.ones(group.shape, dtype=torch.bool)
            masks[group.name][1:3] = False
        else:
            masks |= random_masks([group], min(1 + index % 5, group.shape[-1] - 1), seed=index)
    return masks


def cut_of(family: str, cut: str) -> nn.Module:
    """Return a model pruned by the kinds of CUTS[cut], one after the other."""
    return cut_by(family, CUTS[cut])


def all_cut(family: str) -> nn.Module:
    """Return a model pruned by every kind that its family supports."""
    return cut_by(family, EVERYTHING + (("block",) if family in TRANSFORMERS else ()))


def cut_by(family: str, kinds: Sequence[str]) -> nn.Module:
    """Return a model pruned by one kind after the other."""
    return copy.deepcopy(_cut(family, tuple(kinds)))


@functools.cache
def _cut(family: str, kinds: tuple[str, ...]) -> nn.Module:
    model = dense_of(family)
    for kind in kinds:
        groups = find_groups(model, [kind])
        shrink(model, groups, masks_of(groups))
    return model.eval()
