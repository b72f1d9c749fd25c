"""Forward passes for scoring: plain branches fast, in full precision, and only for the tokens that the answer reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.chain import Branch, Chain, SelfAttention, Step


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and TF32, whatever the caller has switched on."""
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A Linear layer's output.

    On a CPU in float32 by oneDNN, as torch.compile does it: MKL leaves half of the vector unit of an AMD core idle.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch._C._has_mkldnn:
        return F.linear(x, layer.weight, layer.bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), layer.weight, layer.bias, "none", [], "")
    return product


def projected(inside: SelfAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a plain attention; (B, heads, tokens, width) each."""
    batch, tokens, _ = normed.shape
    q, k, v = linear(normed, inside.qkv).view(batch, tokens, 3, inside.heads, -1).permute(2, 0, 3, 1, 4)
    return inside.q_norm(q), inside.k_norm(k), v


def consumed(branch: Branch, stream: Tensor, queries: int | None = None) -> Tensor:
    """What a branch's consumer reads, for the first `queries` tokens if the branch is plain; (B, ..., inputs)."""
    if branch.inside is None:
        return _captured(branch, stream)
    normed = branch.norm(stream)
    if isinstance(branch.inside, SelfAttention):
        q, k, v = projected(branch.inside, normed)
        z = F.scaled_dot_product_attention(q[:, :, :queries], k, v, scale=branch.inside.scale)
        return z.transpose(1, 2).flatten(2)
    hidden: Tensor = branch.inside.act(linear(normed[:, :queries], branch.inside.fc1))
    return hidden


def forward(step: Step, stream: Tensor, queries: int | None = None) -> Tensor:
    """The stream after a step, for its first `queries` tokens; all for None."""
    if not isinstance(step, Branch) or step.inside is None or step.consumer is None:
        return step(stream)[:, :queries]
    added: Tensor = step.scale(linear(consumed(step, stream, queries), step.consumer))
    return stream[:, :queries] + added


def needed(chain: Chain, place: int) -> int | None:
    """How many leading tokens after the step at that place can still reach the answer, None for all."""
    later = chain.steps[place + 1 :]
    lonely = all(isinstance(step, Branch) and step.kind == "ffn" and step.inside is not None for step in later)
    return chain.reads if lonely else None


def onwards(chain: Chain, place: int, stream: Tensor) -> Tensor:
    """Logits from the input stream of the step at that place; (B, classes)."""
    for number in range(place, len(chain.steps)):
        stream = forward(chain.steps[number], stream, needed(chain, number))
    return chain.finish(stream)


def prefixes(chain: Chain, images: Tensor) -> list[Tensor]:
    """Input stream of every step and, last, of the ending; only the tokens that are needed."""
    streams = [chain.embed(images)]
    for number, step in enumerate(chain.steps):
        streams.append(forward(step, streams[-1], needed(chain, number)))
    return streams


def _captured(branch: Branch, stream: Tensor) -> Tensor:
    """The consumer's input, read off while the branch runs; with the stream's leading dimensions."""
    assert branch.consumer is not None
    seen: list[Tensor] = []
    handle = branch.consumer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        branch.run(branch.norm(stream))
    finally:
        handle.remove()
    return seen[0].reshape(*stream.shape[:-1], -1)
