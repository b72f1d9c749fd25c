"""Evaluate several models in one batch, each with one residual channel removed."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.architectures.chain import Branch, Chain, Step


def drop_residual_channels(chain: Chain, channels: Tensor, images: int) -> Chain:
    """Return a chain that evaluates C candidates in one batch (C * images, ...), candidate c without `channels[c]`.

    The channel is set to zero after the embedding, after every branch and after every LayerNorm, whose statistics are
    those of the other channels; all candidates share the model's weights. `embed` of the result takes embedded images,
    (images, tokens, channels). Requires `chain.allows_channel_ablation`.

    Source: UP-ViTs, component 1.
    """
    removed = channels.repeat_interleave(images)
    rows = torch.arange(len(removed), device=removed.device)

    def zeroed(stream: Tensor) -> Tensor:
        if len(channels) == 1:  # usual on a CPU, and faster
            stream[..., channels] = 0
        else:
            stream[rows, ..., removed] = 0
        return stream

    def norm(original: nn.LayerNorm, stream: Tensor) -> Tensor:
        return zeroed(_norm_without_channel(original, stream))

    def step(original: Step) -> Step:
        if isinstance(original, nn.LayerNorm):
            return lambda stream: norm(original, stream)
        if isinstance(original, Branch):
            return replace(original, norm=step(original.norm), scale=lambda added: zeroed(original.scale(added)))
        return original

    return Chain(
        lambda embedded: zeroed(embedded.repeat(len(channels), *[1] * (embedded.dim() - 1))),
        tuple(step(original) for original in chain.steps),
        tuple(step(original) for original in chain.head),
        chain.num_tokens_read,
    )


def _norm_without_channel(norm: nn.LayerNorm, stream: Tensor) -> Tensor:
    """LayerNorm of streams with one zero channel, with mean and variance of the other channels."""
    # with n channels of mean m and variance v, these are m n / (n - 1) and (v - m^2 / (n - 1)) n / (n - 1)
    number = stream.shape[-1]
    normed, mean, scale = torch.native_layer_norm(stream, (number,), None, None, norm.eps)
    ratio = number / (number - 1)
    variance = ratio * (scale.pow(-2) - norm.eps - mean.square() / (number - 1))
    rstd = (variance + norm.eps).rsqrt()  # (C * images, ..., 1)
    normed = torch.addcmul((1 - ratio) * mean * rstd, normed, rstd / scale)
    if norm.weight is not None:
        normed = normed * norm.weight if norm.bias is None else torch.addcmul(norm.bias, normed, norm.weight)
    return normed
