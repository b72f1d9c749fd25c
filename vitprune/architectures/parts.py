"""What the groups of several families share: refusals, slices of layers, residual streams, single weights."""

from collections.abc import Mapping, Sequence

from timm.layers import LayerNorm, RmsNorm
from torch import nn

from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice

NORMS = (nn.LayerNorm, nn.RMSNorm, LayerNorm, RmsNorm)
PRUNABLE = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}


def refuse(path: str, module: nn.Module, why: str) -> BadInput:
    """The error for a module that is not understood, by its name."""
    return BadInput(f"{path} ({type(module).__name__}): {why}; this module cannot be pruned")


def slices(layer: nn.Module, path: str, axis: int, outer: int = 1, inner: int = 1) -> tuple[ParamSlice, ...]:
    """Addresses of a layer's weight along an axis, and of its bias where the axis is the output."""
    parts: tuple[ParamSlice, ...] = (ParamSlice(f"{path}.weight", axis, outer, inner),)
    if axis == 0 and layer.bias is not None:
        parts += (ParamSlice(f"{path}.bias", 0, outer, inner),)
    return parts


def norm(layer: nn.Module, path: str, outer: int = 1) -> tuple[ParamSlice, ...]:
    """Addresses of a LayerNorm's or RMSNorm's own parameters; nothing for no norm at all."""
    if not isinstance(layer, (*NORMS, nn.Identity)):
        raise refuse(path, layer, "only LayerNorm and RMSNorm are understood between channels")
    return tuple(ParamSlice(f"{path}.{leaf}", 0, outer) for leaf, _ in layer.named_parameters())


def stream(
    model: nn.Module, writers: Sequence[str], readers: Sequence[str], norms: Sequence[str]
) -> tuple[ParamSlice, ...]:
    """Addresses of the channels of one residual stream: rows of the layers that write it, columns of its readers."""
    found: tuple[ParamSlice, ...] = ()
    for axis, paths in ((0, writers), (1, readers)):
        for path in paths:
            layer = model.get_submodule(path)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found += slices(layer, path, axis)
            elif not isinstance(layer, nn.Identity):
                raise refuse(path, layer, "expected a Linear or Conv2d layer at the residual stream")
    return found + tuple(part for path in norms for part in norm(model.get_submodule(path), path))


def weights(path: str, block: nn.Module, prunable: Mapping[str, str] = PRUNABLE) -> list[Group]:
    """Every single weight of a block's qkv, proj, fc1 and fc2, one group per layer; `prunable` maps path to pool.

    Source: DIMAP, appendix B; CAP prunes the same layers.
    """
    found = []
    for name, pool in prunable.items():
        layer = block.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise refuse(f"{path}.{name}", layer, "expected a Linear layer")
        param = f"{path}.{name}.weight"
        found.append(Group(param, "weight", tuple(layer.weight.shape), (ParamSlice(param, None),), pool))
    return found
