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
from vitprune.architectures.slices import (
    SliceSet,
    elementwise_slices,
    input_slices,
    is_matrix,
    output_slices,
    sequential_layers,
)
from vitprune.groups import Group


@dataclass(frozen=True)
class MlpSpec:
    """Layers in the order in which they run; between two of them that mix channels lie hidden units.

    `beside` writes the same units as the first layer, and `chunks` is how often the first layer writes each unit.
    """

    layers: tuple[str, ...]
    beside: tuple[str, ...] = ()
    chunks: int = 1


ORDERS: dict[type[nn.Module], MlpSpec] = {
    Mlp: MlpSpec(("fc1", "act", "norm", "fc2")),
    ConvMlp: MlpSpec(("fc1", "norm", "act", "fc2")),
    GatedMlp: MlpSpec(("fc1", "act", "gate", "norm", "fc2")),
    GlobalResponseNormMlp: MlpSpec(("fc1", "act", "grn", "fc2")),
    GluMlp: MlpSpec(("fc1", "act", "norm", "fc2"), chunks=2),
    SwiGLU: MlpSpec(("fc1_x", "act", "norm", "fc2"), beside=("fc1_g",)),
    efficientformer.ConvMlpWithNorm: MlpSpec(("fc1", "norm1", "act", "fc2")),
    efficientformer_v2.ConvMlpWithNorm: MlpSpec(("fc1", "mid", "fc2")),
    levit.LevitMlp: MlpSpec(("ln1", "act", "ln2")),
    pvt_v2.MlpWithDepthwiseConv: MlpSpec(("fc1", "relu", "dwconv", "act", "fc2")),
    tiny_vit.NormMlp: MlpSpec(("fc1", "act", "fc2")),
    byobnet.BottleneckBlock: MlpSpec(("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1")),
    efficientnet.DepthwiseSeparableConv: MlpSpec(()),
    efficientnet.EdgeResidual: MlpSpec(("conv_exp", "bn1", "aa", "se", "conv_pwl")),
    efficientnet.InvertedResidual: MlpSpec(("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl")),
    efficientvit_mit.MBConv: MlpSpec(("inverted_conv", "depth_conv", "point_conv")),
    maxxvit.MbConvBlock: MlpSpec(("conv1_1x1", "norm1", "conv2_kxk", "se_early", "norm2", "se", "conv3_1x1")),
    resnet.BasicBlock: MlpSpec(("conv1", "bn1", "drop_block", "act1", "aa", "conv2")),
    resnet.Bottleneck: MlpSpec(("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")),
    tiny_vit.MBConv: MlpSpec(("conv1", "act1", "conv2", "act2", "conv3")),
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
    steps = [step for leaf in order.layers[:-1] for step in sequential_layers(f"{path}.{leaf}", getattr(module, leaf))]
    steps += list(sequential_layers(f"{path}.{order.layers[-1]}", getattr(module, order.layers[-1])))[:1]
    places = [number for number, (_, layer) in enumerate(steps) if is_matrix(layer)]
    for place in (0, len(steps) - 1):
        if place not in places:
            raise refuse(*steps[place], "expected a Linear or Conv2d layer that mixes channels")
    found = []
    for start, end in pairwise(places):
        chunks = order.chunks if start == 0 else 1
        held = output_slices(*steps[start], chunks)
        for leaf in order.beside if start == 0 else ():
            held += output_slices(f"{path}.{leaf}", getattr(module, leaf), chunks)
        held = sum((elementwise_slices(*step) for step in steps[start + 1 : end]), held)
        held += input_slices(*steps[end])
        name = path if len(places) == 2 else steps[start][0]
        found.append(_group(name, steps[end][1], held))
    return found


def _group(name: str, reader: Any, held: SliceSet) -> Group:
    return Group(name, "ffn", (reader.weight.shape[1],), held.slices, buffers=held.buffers)
