"""Axis of the channels that a norm normalizes, found from its inputs and outputs."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

ROUNDING = 1e-2  # of a norm computed in half precision


def norm_axis(norm: nn.Module, inputs: Tensor, output: Tensor) -> int | None:
    """Return the axis over which a LayerNorm or RMSNorm normalizes.

    The class does not determine it: norms of pixels are subclasses of norms of tokens in some libraries. The first
    image or window is compared with both formulas.

    Args:
        norm: The module, with `weight` and `eps`; subclasses of nn.LayerNorm subtract the mean, others do not.
        inputs: Its inputs, (B, ..., C) or (B, C, H, W).
        output: Its outputs for them.

    Returns:
        -1, 1, or None if the module does more than normalize, scale and shift, as one with an activation does.
    """
    module: Any = norm
    for axis in (-1, 1):
        if inputs.shape[axis] != len(module.weight):
            continue
        x, expected = (value[:1].detach().movedim(axis, -1).double() for value in (inputs, output))
        x = x - x.mean(dim=-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        scale = (x.square().mean(dim=-1, keepdim=True) + norm_eps(norm, inputs.dtype)).rsqrt()
        bias = getattr(norm, "bias", None)
        normalized = x * scale * module.weight.detach().double() + (0.0 if bias is None else bias.detach().double())
        largest = float(expected.abs().max())
        if not math.isfinite(largest) or torch.allclose(normalized, expected, ROUNDING, ROUNDING * largest):
            return axis
    return None


def norm_eps(norm: nn.Module, dtype: torch.dtype) -> float:
    """Return the constant that a norm adds to the variance of inputs of a type; that of nn.RMSNorm may be unset."""
    eps: float | None = cast(Any, norm).eps
    return torch.finfo(dtype).eps if eps is None else eps
