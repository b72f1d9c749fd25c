"""Many models at once, each without one residual channel, on one set of weights."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.chain import Branch, Chain, Step


def narrowed(chain: Chain, channels: Tensor, images: int) -> Chain:
    """The chain of several candidates in one batch, (candidates C * images, ...), candidate c without `channels[c]`.

    The channel is zero behind the embedding, behind every LayerNorm, whose statistics run over the channels that are
    left, and behind every branch; the weights are the model's own. Its `embed` takes the embedded images, (images,
    tokens, channels), and holds for a chain that is `narrow`.

    Source: UP-ViTs, component 1.
    """
    lone = channels.repeat_interleave(images)
    rows = torch.arange(len(lone), device=lone.device)

    def emptied(stream: Tensor) -> Tensor:
        stream[rows, ..., lone] = 0
        return stream

    def norm(whole: nn.LayerNorm, stream: Tensor) -> Tensor:
        left = stream.shape[-1] - 1
        centred = emptied(stream - stream.sum(-1, keepdim=True) / left)
        normed = centred * (centred.square().sum(-1, keepdim=True) / left + whole.eps).rsqrt()
        if whole.weight is not None:
            normed = normed * whole.weight
        return emptied(normed if whole.bias is None else normed + whole.bias)

    def step(whole: Step) -> Step:
        if isinstance(whole, nn.LayerNorm):
            return lambda stream: norm(whole, stream)
        if isinstance(whole, Branch):
            return replace(whole, norm=step(whole.norm), scale=lambda added: emptied(whole.scale(added)))
        return whole

    return Chain(
        lambda embedded: emptied(embedded.repeat(len(channels), *[1] * (embedded.dim() - 1))),
        tuple(step(whole) for whole in chain.steps),
        tuple(step(whole) for whole in chain.ending),
        chain.reads,
    )
