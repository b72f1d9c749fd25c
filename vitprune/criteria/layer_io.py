"""Per-position inputs and outputs of Linear (tokens) and Conv2d (unfolded patches) layers."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def is_plain_layer(layer: nn.Module) -> bool:
    """Return whether a layer is Linear or an ungrouped, zero-padded Conv2d: output = W @ input at every position."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear)


def layer_inputs(layer: nn.Module, value: Tensor, images: int) -> Tensor:
    """Return the inputs of a plain layer per position, in the order of its weight rows.

    Shapes: (images, positions, inputs); windows of one image are neighbors.
    """
    if isinstance(layer, nn.Conv2d):
        padding = cast(tuple[int, int], layer.padding)
        value = F.unfold(value, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
    return value.reshape(images, -1, value.shape[-1])  # windows of one image are contiguous


def layer_outputs(layer: nn.Module, value: Tensor, images: int) -> Tensor:
    """Return the outputs of a plain layer, or gradients w.r.t. them, per position; (images, positions, outputs)."""
    if isinstance(layer, nn.Conv2d):
        value = value.flatten(2).transpose(1, 2)
    return value.reshape(images, -1, value.shape[-1])
