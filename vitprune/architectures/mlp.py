"""Groups of hidden units: specs of known MLPs and bottlenecks, and their groups."""

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

from vitprune.architectures.slices import (
    SliceSet,
    elementwise_slices,
    input_slices,
    mixes_channels,
    not_prunable,
    output_slices,
    sequential_layers,
)
from vitprune.groups import Group


@dataclass(frozen=True)
class MlpSpec:
    """Layers of an MLP. The channels between two layers that mix channels are one group of hidden units.

    Attributes:
        layers: names of the layers, in the order in which they run.
        parallel: layers that write the same hidden units as the first one, such as the gate of SwiGLU.
        chunks: number of times that the first layer writes each hidden unit, 2 for a GLU.
    """

    layers: tuple[str, ...]
    parallel: tuple[str, ...] = ()
    chunks: int = 1


SPECS: dict[type[nn.Module], MlpSpec] = {
    Mlp: MlpSpec(("fc1", "act", "norm", "fc2")),
    ConvMlp: MlpSpec(("fc1", "norm", "act", "fc2")),
    GatedMlp: MlpSpec(("fc1", "act", "gate", "norm", "fc2")),
    GlobalResponseNormMlp: MlpSpec(("fc1", "act", "grn", "fc2")),
    GluMlp: MlpSpec(("fc1", "act", "norm", "fc2"), chunks=2),
    SwiGLU: MlpSpec(("fc1_x", "act", "norm", "fc2"), parallel=("fc1_g",)),
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
    """Return the groups of hidden units of a module of `SPECS`, one for every two layers that mix channels.

    Args:
        path: path of the module in the model.
        module: the module.

    Raises:
        BadInput: a layer does not use its weights unchanged, or a layer between two others couples hidden units.

    Source: UP-ViTs, component 3: a unit is a row and bias of one layer and a column of the next.
    """
    spec = SPECS[type(module)]
    if not spec.layers:
        return []
    steps = [step for leaf in spec.layers[:-1] for step in sequential_layers(f"{path}.{leaf}", getattr(module, leaf))]
    steps += list(sequential_layers(f"{path}.{spec.layers[-1]}", getattr(module, spec.layers[-1])))[:1]
    mixing = [index for index, (_, layer) in enumerate(steps) if mixes_channels(layer)]
    for end in (0, len(steps) - 1):
        if end not in mixing:
            raise not_prunable(*steps[end], "expected a Linear or Conv2d layer that mixes channels")
    result = []
    for writer, reader in pairwise(mixing):
        chunks = spec.chunks if writer == 0 else 1
        units = output_slices(*steps[writer], chunks)
        for leaf in spec.parallel if writer == 0 else ():
            units += output_slices(f"{path}.{leaf}", getattr(module, leaf), chunks)
        units = sum((elementwise_slices(*step) for step in steps[writer + 1 : reader]), units)
        units += input_slices(*steps[reader])
        name = path if len(mixing) == 2 else steps[writer][0]
        result.append(_group(name, steps[reader][1], units))
    return result


def _group(name: str, reader: Any, units: SliceSet) -> Group:
    return Group(name, "ffn", (reader.weight.shape[1],), units.slices, buffers=units.buffers)
