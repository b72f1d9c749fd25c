"""Quantization-aware training: fake INT8 quantization with straight-through gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitprune.models.int8 import WEIGHT_BITS

INPUT_BITS = 8
LAYERS: tuple[Callable[..., Any], ...] = (F.linear, F.conv2d)


class FakeQuant(TorchFunctionMode):
    """Mode in which trained linear layers and convolutions use fake-quantized weights and inputs.

    It applies where gradients are enabled and the weight requires one, so not to teachers or to evaluation.
    Weights: symmetric, per output channel, so that zero is exact, as in `models.int8`. Inputs: per tensor, with the
    range of the batch.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (2018), section 3.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, with fake-quantized tensors if it is a trained layer."""
        if func not in LAYERS or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        named = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})  # some layers give them by name
        if named["weight"].requires_grad:
            named |= {"input": fake_quantize_input(named["input"]), "weight": fake_quantize_weight(named["weight"])}
        return func(named.pop("input"), named.pop("weight"), *args[2:], **named)


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Quantize a weight (out, ...) symmetrically per output channel, to 2**WEIGHT_BITS + 1 values."""
    top = 2 ** (WEIGHT_BITS - 1)
    largest = weight.detach().flatten(1).abs().amax(1).float()
    scale = (largest / top).clamp_min(torch.finfo(torch.float32).tiny)
    points = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, points, 0, -top, top).to(weight.dtype)


def fake_quantize_input(x: Tensor) -> Tensor:
    """Quantize a tensor to 2**INPUT_BITS values over the range of its minimum, maximum and zero."""
    top = 2**INPUT_BITS - 1
    low, high = (value.float() for value in torch.aminmax(x.detach()))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / top).clamp_min(torch.finfo(torch.float32).tiny)
    point = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, point, 0, top).to(x.dtype)
