"""Hidden units of every MLP and bottleneck that we know: by the order in which its layers run."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from timm.layers import ConvMlp, GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import (
    byobnet,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    levit,
    maxxvit,
    pvt_v2,
    resnet,
    tiny_vit,
)
from torch import nn

from vitprune.architectures.parts import refuse
from vitprune.architectures.slices import Found, along, columns, is_matrix, leaves, rows
from vitprune.groups import Group


@dataclass(frozen=True)
class Order:
    """Layers in the order in which they run; between two of them that mix channels lie hidden units.

    `beside` writes the same units as the first layer, and `chunks` is how often the first layer writes each unit.
    """

    layers: tuple[str, ...]
    beside: tuple[str, ...] = ()
    chunks: int = 1


ORDERS: dict[type[nn.Module], Order] = {
    Mlp: Order(("fc1", "act", "norm", "fc2")),
    ConvMlp: Order(("fc1", "norm", "act", "fc2")),
    GatedMlp: Order(("fc1", "act", "gate", "norm", "fc2")),
    GlobalResponseNormMlp: Order(("fc1", "act", "grn", "fc2")),
    GluMlp: Order(("fc1", "act", "norm", "fc2"), chunks=2),
    SwiGLU: Order(("fc1_x", "act", "norm", "fc2"), beside=("fc1_g",)),
    efficientformer.ConvMlpWithNorm: Order(("fc1", "norm1", "act", "fc2")),
    efficientformer_v2.ConvMlpWithNorm: Order(("fc1", "mid", "fc2")),
    levit.LevitMlp: Order(("ln1", "act", "ln2")),
    pvt_v2.MlpWithDepthwiseConv: Order(("fc1", "relu", "dwconv", "act", "fc2")),
    tiny_vit.NormMlp: Order(("fc1", "act", "fc2")),
    byobnet.BottleneckBlock: Order(("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1")),
    efficientnet.DepthwiseSeparableConv: Order(()),
    efficientnet.EdgeResidual: Order(("conv_exp", "bn1", "aa", "se", "conv_pwl")),
    efficientnet.InvertedResidual: Order(("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl")),
    efficientvit_mit.MBConv: Order(("inverted_conv", "depth_conv", "point_conv")),
    maxxvit.MbConvBlock: Order(("conv1_1x1", "norm1", "conv2_kxk", "se_early", "norm2", "se", "conv3_1x1")),
    resnet.BasicBlock: Order(("conv1", "bn1", "drop_block", "act1", "aa", "conv2")),
    resnet.Bottleneck: Order(("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")),
    tiny_vit.MBConv: Order(("conv1", "act1", "conv2", "act2", "conv3")),
}


def groups(path: str, module: Any) -> list[Group]:
    """The hidden units of a known module, one group for every two layers that mix channels.

    Raises:
        BadInput: a layer is not plain, or something between two of them couples hidden units.

    Source: UP-ViTs, component 3: a unit is a row and bias of one layer and a column of the next.
    """
    order = ORDERS[type(module)]
    if not order.layers:
        return []
    steps = [step for leaf in order.layers[:-1] for step in leaves(f"{path}.{leaf}", getattr(module, leaf))]
    steps += list(leaves(f"{path}.{order.layers[-1]}", getattr(module, order.layers[-1])))[:1]
    places = [number for number, (_, layer) in enumerate(steps) if is_matrix(layer)]
    for place in (0, len(steps) - 1):
        if place not in places:
            raise refuse(*steps[place], "expected a Linear or Conv2d layer that mixes channels")
    found = []
    for start, end in pairwise(places):
        chunks = order.chunks if start == 0 else 1
        held = rows(*steps[start], chunks)
        for leaf in order.beside if start == 0 else ():
            held += rows(f"{path}.{leaf}", getattr(module, leaf), chunks)
        held = sum((along(*step) for step in steps[start + 1 : end]), held)
        held += columns(*steps[end])
        name = path if len(places) == 2 else steps[start][0]
        found.append(_group(name, steps[end][1], held))
    return found


def _group(name: str, reader: Any, held: Found) -> Group:
    return Group(name, "ffn", (reader.weight.shape[1],), held.slices, buffers=held.buffers)
