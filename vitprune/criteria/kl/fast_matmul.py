"""The products of a forward pass, in full precision: on a CPU with AVX-512 by oneDNN, elsewhere as torch has them.

oneDNN is what torch.compile puts in their place. MKL, which eager torch calls, leaves half of the vector unit of an AMD
core with AVX-512 idle: DeiT-Tiny's layers run at 95 GFLOP/s by the one and 205 by the other. On one with AVX2 alone it
is 87 and 81.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KEPT = (32 << 20) - (1 << 16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and TF32, whatever the caller has switched on."""
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


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc learn that blocks of up to 32 MiB come and go, so that it keeps them instead of mapping each anew.

    Source: mallopt(3), M_MMAP_THRESHOLD is dynamic. Zeroing new pages took a fifth of the time of scoring.
    """
    if device.type == "cpu":
        torch.empty(KEPT, dtype=torch.uint8)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A Linear layer's output; x is (..., inputs)."""
    return _onednn(x, layer.weight, layer.bias) if _by_onednn(x) else F.linear(x, layer.weight, layer.bias)


def activated(x: Tensor, layer: nn.Linear, act: nn.Module) -> Tensor:
    """A Linear layer's output and an activation."""
    if isinstance(act, nn.GELU) and act.approximate == "none" and _by_onednn(x):
        return _onednn(x, layer.weight, layer.bias, "gelu")
    hidden: Tensor = act(linear(x, layer))
    return hidden


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention's output of all heads; q (B, heads, queries, width) and k, v alike -> (B, queries, heads * width)."""
    if not _by_onednn(q):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    scaled = torch.mul(q, scale, out=q.new_empty(q.shape))
    logits = _batched(scaled.flatten(0, 1), k.transpose(2, 3).contiguous().flatten(0, 1))
    z = _batched(logits.softmax(-1), v.contiguous().flatten(0, 1))  # (B * heads, queries, width)
    return z.view(q.shape).transpose(1, 2).flatten(2)


def _by_onednn(x: Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled) and _onednn_works()
    )


@functools.cache
def _onednn_works() -> bool:
    """Whether this processor gains by oneDNN, and this build of torch knows the two operators, which is no promise."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        _onednn(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "gelu")
        _batched(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    except (AttributeError, RuntimeError):
        return False
    return True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, act, [], "none")
    return product


def _batched(left: Tensor, right: Tensor) -> Tensor:
    """Products (G, n, c) @ (G, c, m) in one call, each a group of a convolution; torch binds no batched product."""
    number, rows, inner = left.shape
    filters, image = left.reshape(number * rows, inner, 1, 1), right.reshape(1, number * inner, 1, -1)
    one = [1, 1]
    products: Tensor = torch.ops.mkldnn._convolution_pointwise(
        image, filters, None, [0, 0], one, one, number, "none", [], "none"
    )
    return products.view(number, rows, -1)
