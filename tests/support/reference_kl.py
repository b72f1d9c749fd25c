"""Reference implementations of masked and gated ViTs, KL, LAMP and unit elimination."""

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitprune import Group


def live_norm(x: Tensor, norm: nn.LayerNorm, live: Tensor) -> Tensor:
    """LayerNorm with statistics over the kept channels only; removed channels are zero."""
    number = live.sum()
    mean = (x * live).sum(-1, keepdim=True) / number
    variance = (((x - mean) * live) ** 2).sum(-1, keepdim=True) / number
    return ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias) * live


class LiveNorm(nn.Module):
    """LayerNorm of a model over its kept channels only; removed channels are zero."""

    def __init__(self, norm: nn.LayerNorm, live: Tensor):
        super().__init__()
        self.norm, self.live = norm, live.nonzero().flatten()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight[self.live], self.norm.bias[self.live]
        part = nn.functional.layer_norm(x[..., self.live], (len(self.live),), weight, bias, self.norm.eps)
        return torch.zeros_like(x).index_copy(-1, self.live, part)


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
    """Logits of a plain ViT with units of its dense weights masked, one by one; shapes do not change.

    masks: as the library names them ("residual", "blocks.0.attn", "blocks.0.mlp"); groups without a mask are dense.
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
    units = [(float(value), index) for index, value in enumerate(torch.cat([s.flatten() for s in scores.values()]))]
    removed = {index for _, index in sorted(units)[:remove]}
    flat = torch.tensor([index not in removed for index in range(len(units))])
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


def gated_norm(x: Tensor, norm: nn.LayerNorm, gate: Tensor) -> Tensor:
    """LayerNorm whose mean and variance weight channel c by gate[c], and whose output is gated."""
    mean = (x * gate).sum(-1, keepdim=True) / gate.sum()
    variance = ((x - mean).square() * gate).sum(-1, keepdim=True) / gate.sum()
    return ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias) * gate


def gated_attention(x: Tensor, attn: nn.Module, heads: Tensor, channels: Tensor) -> Tensor:
    """Attention with a gate on each head's output and on each channel's part of logits and output."""
    number, width = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).unflatten(-1, (3, number, width)).permute(2, 0, 3, 1, 4)  # (B, heads, N, channels) each
    gate = channels.view(number, 1, width)
    z = ((q * gate) @ k.transpose(-2, -1) * attn.scale).softmax(-1) @ (v * gate)
    return attn.proj((z * heads.view(number, 1, 1)).transpose(1, 2).flatten(2))


def gated_vit(model: nn.Module, images: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """Logits of a plain ViT with a gate on every unit: at 1 the dense model, at 0 the model without the unit.

    gates: as the library names the groups ("residual", "blocks.0.attn", "blocks.0.attn.heads", "blocks.0.mlp").
    """
    one = torch.ones((), dtype=images.dtype)
    live = gates.get("residual", torch.ones(model.embed_dim, dtype=images.dtype))
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), patches], dim=1) + model.pos_embed
    for number, block in enumerate(model.blocks):
        path, attn = f"blocks.{number}", block.attn
        heads = gates.get(f"{path}.attn.heads", one.expand(attn.num_heads))
        channels = gates.get(f"{path}.attn", one.expand(attn.num_heads, attn.head_dim))
        x = x + gated_attention(gated_norm(x, block.norm1, live), attn, heads, channels)
        hidden = block.mlp.act(block.mlp.fc1(gated_norm(x, block.norm2, live)))
        x = x + block.mlp.fc2(hidden * gates.get(f"{path}.mlp", one))
    return model.head(gated_norm(x, model.norm, live)[:, 0])


def fisher_quadratic(model: nn.Module, images: Tensor, groups: list) -> dict[str, Tensor]:
    """1/2 sum over classes of p_c (d log p_c / d gate)^2 for each image alone; group name -> (units, B)."""
    result = {group.name: torch.zeros(group.units, len(images), dtype=images.dtype) for group in groups}
    for index, image in enumerate(images):
        gates = {group.name: torch.ones(group.shape, dtype=images.dtype, requires_grad=True) for group in groups}
        output = gated_vit(model, image[None], gates)[0].log_softmax(-1)
        for logp in output:
            grads = torch.autograd.grad(logp, list(gates.values()), retain_graph=True)
            for name, grad in zip(gates, grads, strict=True):
                result[name][:, index] += logp.detach().exp() * grad.flatten().square() / 2
    return result


def gated_stream(model: nn.Module, images: Tensor, group: Group, gate: Tensor) -> Tensor:
    """Logits with a gate on each channel of a residual stream, by hooks on the layers that read it (by its slices).

    Linear layers and convolutions read gated inputs; the statistics of its norms count channel c gate[c] times.
    """
    handles = []
    for part in group.slices:
        path, _, leaf = part.param.rpartition(".")
        module = model.get_submodule(path)
        spread = gate.repeat_interleave(part.inner).repeat(part.outer)
        if leaf == "weight" and part.axis == 1 and isinstance(module, nn.Linear | nn.Conv2d):
            shaped = spread[:, None, None] if isinstance(module, nn.Conv2d) else spread
            handles.append(module.register_forward_pre_hook(lambda _, args, by=shaped: (args[0] * by, *args[1:])))
        elif leaf == "weight" and isinstance(module, nn.LayerNorm):
            axis = 1 if isinstance(module, LayerNorm2d) else -1

            def gated(
                norm: nn.Module, args: tuple[Tensor, ...], _: Tensor, by: Tensor = spread, axis: int = axis
            ) -> Tensor:
                return (gated_norm(args[0].movedim(axis, -1), norm, by) / by).movedim(-1, axis)

            handles.append(module.register_forward_hook(gated))
    with torch.no_grad():
        logits = model(images)
    for handle in handles:
        handle.remove()
    return logits


def assert_fades(model: nn.Module, images: Tensor, groups: list[Group], result: dict[str, Tensor]) -> None:
    """Assert that scores (units, images) equal the curvature of the KL divergence in the units' gates."""
    step = 1e-4
    with torch.no_grad():
        dense = model(images)
    for group in groups:
        for unit in range(0, group.units, max(1, group.units // 3)):
            apart = []
            for by in (-step, step):
                gate = torch.ones(group.units, dtype=torch.float64)
                gate[unit] += by
                apart.append(kl(dense, gated_stream(model, images, group, gate)))
            assert sum(apart) / 2 / step**2 == pytest.approx(float(result[group.name][unit].sum()), rel=1e-3, abs=1e-7)


def naive_elimination(weight: Tensor, inputs: Tensor, metric: Tensor, inner: int) -> tuple[list[int], list[float]]:
    """Greedy order of units and half the error after each removal; every candidate by its own least-squares fit."""
    padded = torch.cat([weight, torch.zeros(len(weight), 1, dtype=weight.dtype)], dim=1)
    removed: list[int] = []
    totals = []
    units = weight.shape[1] // inner
    while len(removed) < units:
        trials = {}
        for unit in (unit for unit in range(units) if unit not in removed):
            remaining = [u for u in range(units) if u not in (*removed, unit)]
            kept = [u * inner + n for u in remaining for n in range(inner)] + [weight.shape[1]]
            fitted = torch.zeros_like(padded)
            fitted[:, kept] = torch.linalg.solve(inputs[kept][:, kept], inputs[kept] @ padded.T).T
            change = padded - fitted
            trials[unit] = float(torch.einsum("oi,ij,pj,op->", change, inputs, change, metric)) / 2
        best = min(trials, key=lambda unit: trials[unit])
        removed.append(best)
        totals.append(trials[best])
    return removed, totals
