"""Slow, obvious versions that the library is held against."""

import torch
from torch import Tensor, nn


def live_norm(x: Tensor, norm: nn.LayerNorm, live: Tensor) -> Tensor:
    """LayerNorm with statistics over the live channels only; removed channels come out as zero."""
    number = live.sum()
    mean = (x * live).sum(-1, keepdim=True) / number
    variance = (((x - mean) * live) ** 2).sum(-1, keepdim=True) / number
    return ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias) * live


def literal_attention(x: Tensor, attn: nn.Module, keep: Tensor) -> Tensor:
    """Attention over the kept channels of (possibly merged) heads, at the scale of the original heads.

    keep: (heads, channels), True keeps. Each channel adds its q * k product to the logits of its head.
    """
    q, k, v = attn.qkv(x).chunk(3, dim=-1)  # (B, N, channels) each
    width = keep.shape[1]
    joined = torch.zeros_like(v)
    for head, channels in enumerate(keep):
        logits = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype)
        for index in (head * width + channels.nonzero().flatten()).tolist():
            logits += q[:, :, index, None] * k[:, None, :, index]
        weights = (logits * attn.scale).softmax(-1)
        for index in (head * width + channels.nonzero().flatten()).tolist():
            joined[:, :, index] = (weights @ v[:, :, index, None]).squeeze(-1)
    return attn.proj(joined)


@torch.no_grad()
def literal_vit(model: nn.Module, images: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Logits of a plain ViT with units masked out of its dense weights, one by one; nothing is cut.

    masks: as the library names them ("residual", "blocks.0.attn", "blocks.0.mlp"); what is not named is whole.
    """
    live = masks.get("residual", torch.ones(model.embed_dim, dtype=torch.bool))
    patches = torch.cat([model.patch_embed.proj(image[None]).flatten(2).transpose(1, 2) for image in images])
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), patches], dim=1) + model.pos_embed
    x = x * live
    for number, block in enumerate(model.blocks):
        heads = torch.ones(block.attn.num_heads, block.attn.head_dim, dtype=torch.bool)
        keep = masks.get(f"blocks.{number}.attn", heads)
        x = (x + literal_attention(live_norm(x, block.norm1, live), block.attn, keep)) * live
        hidden = block.mlp.act(block.mlp.fc1(live_norm(x, block.norm2, live)))
        hidden = hidden * masks.get(f"blocks.{number}.mlp", torch.ones(hidden.shape[-1]))
        x = (x + block.mlp.fc2(hidden)) * live
    return model.head(live_norm(x, model.norm, live)[:, 0])


def naive_masks(scores: dict[str, Tensor], remove: int) -> dict[str, Tensor]:
    """Sort all units by (score, position) and remove the first `remove`."""
    units = [(float(value), place) for place, value in enumerate(torch.cat([s.flatten() for s in scores.values()]))]
    gone = {place for _, place in sorted(units)[:remove]}
    flat = torch.tensor([place not in gone for place in range(len(units))])
    parts = torch.split(flat, [score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def lamp(weight: Tensor) -> Tensor:
    """Score of a layer's weights as LAMP writes it: ascending sort, total minus a shifted running sum.

    Source: Lee et al. 2021, as described in their section 3.
    """
    squares = weight.double().flatten() ** 2
    ascending, order = squares.sort(descending=False, stable=True)
    running = ascending.cumsum(0)
    smaller = torch.cat([torch.zeros(1, dtype=torch.float64), running[:-1]])
    scores = torch.zeros_like(squares)
    scores[order] = ascending / (running[-1] - smaller)
    return scores.view(weight.shape)


def kl(first: Tensor, second: Tensor) -> float:
    """Sum over images of KL(first || second), in nats, from logits."""
    p, q = first.softmax(-1), second.softmax(-1)
    return float((p * (p / q).log()).sum())
