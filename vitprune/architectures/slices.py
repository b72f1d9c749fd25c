"""Groups of the single weights of layers, and the error that names a module."""

from typing import Any

from timm.layers import Conv2dSame
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice

# use their weights unchanged, unlike StdConv2d, which standardizes them, zeros too; the last is in MultiheadAttention
PLAIN = (nn.Linear, nn.Conv2d, Conv2dSame, NonDynamicallyQuantizableLinear)
NOT_PLAIN = "expected a Linear or Conv2d layer that uses its weights unchanged"


def not_prunable(path: str, module: nn.Module, why: str) -> BadInput:
    """Return the error that names a module which cannot be pruned and gives the reason."""
    return BadInput(f"{path} ({type(module).__name__}): {why}; this module cannot be pruned")


def weight_group(path: str, layer: Any, layer_type: str) -> Group:
    """Return the group of all single weights of a layer.

    Args:
        path: Path of the layer in the model.
        layer: A Linear or Conv2d.
        layer_type: DIMAP module of the layer, such as qkv, proj or mlp.

    Raises:
        BadInput: the layer does not use its weights unchanged.

    Source: DIMAP, appendix B; CAP prunes the same layers.
    """
    if type(layer) not in PLAIN:
        raise not_prunable(path, layer, NOT_PLAIN)
    param = f"{path}.weight"
    return Group(param, "weight", tuple(layer.weight.shape), (ParamSlice(param, None),), layer_type)
