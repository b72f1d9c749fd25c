"""Full-precision matrix products of a forward pass: oneDNN on CPUs with AVX-512, torch elsewhere.

torch.compile selects oneDNN too. MKL, which eager torch calls, leaves half of the vector unit of an AMD core with
AVX-512 unused: DeiT-Tiny's layers run at 95 GFLOP/s with MKL and 205 with oneDNN. With AVX2 it is 87 and 81.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MMAP_THRESHOLD = (32 << 20) - (1 << 16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable gradients, autocast and TF32 while the context is open."""
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def raise_mmap_threshold(device: torch.device) -> None:
    """Raise glibc's mmap threshold to 32 MiB by freeing a block of that size, so that freed memory is reused.

    Zeroing newly mapped pages took a fifth of the scoring time.

    Source: mallopt(3), M_MMAP_THRESHOLD is dynamic.
    """
    if device.type == "cpu":
        torch.empty(MMAP_THRESHOLD, dtype=torch.uint8)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return layer(x) of a Linear layer; x is (..., inputs)."""
    return _onednn(x, layer.weight, layer.bias) if _by_onednn(x) else F.linear(x, layer.weight, layer.bias)


def linear_activation(x: Tensor, layer: nn.Linear, act: nn.Module) -> Tensor:
    """Return act(layer(x)), fused if the activation is an exact GELU."""
    if isinstance(act, nn.GELU) and act.approximate == "none" and _by_onednn(x):
        return _onednn(x, layer.weight, layer.bias, "gelu")
    hidden: Tensor = act(linear(x, layer))
    return hidden


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * q k^T) v: q, k, v (B, heads, tokens, width) -> (B, queries, heads * width)."""
    if not _by_onednn(q):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    scaled = torch.mul(q, scale, out=q.new_empty(q.shape))
    logits = _batched(scaled.flatten(0, 1), k.transpose(2, 3).contiguous().flatten(0, 1))
    z = _batched(logits.softmax(-1), v.contiguous().flatten(0, 1))  # (B * heads, queries, width)
    return z.view(q.shape).transpose(1, 2).flatten(2)


def _by_onednn(x: Tensor) -> bool:
    is_enabled = x.device.type == "cpu" and bool(torch.backends.mkldnn.enabled)
    return is_enabled and x.dtype == torch.float32 and _onednn_works()


@functools.cache
def _onednn_works() -> bool:
    """Return whether the CPU has AVX-512 and this torch build has the two private oneDNN operators."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        _onednn(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "gelu")
        _batched(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    except (AttributeError, RuntimeError):
        return False
    return True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, act, [], "none")
    return product


def _batched(left: Tensor, right: Tensor) -> Tensor:
    """Compute (G, n, c) @ (G, c, m) as one grouped convolution; oneDNN's batched product has no binding in torch."""
    number, rows, inner = left.shape
    filters, image = left.reshape(number * rows, inner, 1, 1), right.reshape(1, number * inner, 1, -1)
    stride = dilation = [1, 1]
    products: Tensor = torch.ops.mkldnn._convolution_pointwise(
        image, filters, None, [0, 0], stride, dilation, number, "none", [], "none"
    )
    return products.view(number, rows, -1)
