"""What a layer reads and writes, place by place: the tokens of a Linear layer, the positions of a convolution."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


def plain(layer: nn.Module) -> bool:
    """Whether every output of a layer is a weighted sum of what it reads at one place, by one row of its weight."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def layer_inputs(layer: nn.Module, value: Tensor, images: int) -> Tensor:
    """What a plain layer reads; (images, places, inputs), inputs as in a row of its weight."""
    if isinstance(layer, nn.Conv2d):
        padding = cast(tuple[int, int], layer.padding)
        value = F.unfold(value, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
    return value.reshape(images, -1, value.shape[-1])  # windows of an image are neighbours


def layer_outputs(layer: nn.Module, value: Tensor, images: int) -> Tensor:
    """What a plain layer writes, or slopes by it; (images, places, outputs)."""
    if isinstance(layer, nn.Conv2d):
        value = value.flatten(2).transpose(1, 2)
    return value.reshape(images, -1, value.shape[-1])
