"""Many models at once, each without one residual channel, on one set of weights."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.architectures.chain import Branch, Chain, Step


def drop_residual_channels(chain: Chain, channels: Tensor, images: int) -> Chain:
    """The chain of several candidates in one batch, (candidates C * images, ...), candidate c without `channels[c]`.

    The channel is zero behind the embedding, behind every LayerNorm, whose statistics run over the channels that are
    left, and behind every branch; the weights are the model's own. Its `embed` takes the embedded images, (images,
    tokens, channels), and holds for a chain that is `narrow`.

    Source: UP-ViTs, component 1.
    """
    lone = channels.repeat_interleave(images)
    rows = torch.arange(len(lone), device=lone.device)

    def emptied(stream: Tensor) -> Tensor:
        if len(channels) == 1:  # the usual case on a CPU, and faster
            stream[..., channels] = 0
        else:
            stream[rows, ..., lone] = 0
        return stream

    def norm(whole: nn.LayerNorm, stream: Tensor) -> Tensor:
        return emptied(_live(whole, stream))

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


def _live(norm: nn.LayerNorm, stream: Tensor) -> Tensor:
    """LayerNorm of streams that are zero in one channel, by the mean and variance of the others.

    With n channels of mean m and variance v over all, those are m n / (n - 1) and (v - m^2 / (n - 1)) n / (n - 1).
    """
    number = stream.shape[-1]
    normed, mean, scale = torch.native_layer_norm(stream, (number,), None, None, norm.eps)
    more = number / (number - 1)
    variance = more * (scale.pow(-2) - norm.eps - mean.square() / (number - 1))
    own = (variance + norm.eps).rsqrt()  # (C * images, ..., 1)
    normed = torch.addcmul((1 - more) * mean * own, normed, own / scale)
    if norm.weight is not None:
        normed = normed * norm.weight if norm.bias is None else torch.addcmul(norm.bias, normed, norm.weight)
    return normed
