"""timm's attentions for heads that are narrower together than the stream around them, which timm's have no words for.

The weights are timm's by name and meaning. timm's forward passes take the width of their input for that of the heads.
"""

import math
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat, resolve_self_attn_mask
from timm.models import beit, cait, convit, eva, swin_transformer_v2, twins, xcit
from torch import Tensor, nn
from torch.nn import functional as F


def _split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * heads * width) as parts of (B, heads, N, width)."""
    batch, tokens, _ = projected.shape
    return projected.view(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, fused: bool = False) -> Tensor:
    """Join the heads (B, N, heads * width) of softmax(scale * q k^T + bias) v."""
    if fused:
        dropout = attn.attn_drop.p if attn.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
    else:
        logits = q * attn.scale @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        mixed = attn.attn_drop(weights) @ v
    return mixed.transpose(1, 2).flatten(2)


def _projected(attn: Any, joined: Tensor) -> Tensor:
    out: Tensor = attn.proj_drop(attn.proj(joined))
    return out


def _with_biases(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v where q and v have biases apart from the layer."""
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return _split(F.linear(x, attn.qkv.weight, bias), 3, attn.num_heads)


class CutBeit(nn.Module):
    """BEiT's attention with its table of relative positions."""

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attend within x (B, N, C)."""
        own = None if self.relative_position_bias_table is None else beit.Attention._get_rel_pos_bias(self)
        bias = shared_rel_pos_bias if own is None else own if shared_rel_pos_bias is None else own + shared_rel_pos_bias
        q, k, v = _with_biases(self, x)
        return _projected(self, _attend(self, q, k, v, bias, self.fused_attn))


class CutWindowV2(nn.Module):
    """Swin V2's cosine attention, whose logits do not depend on the number of channels."""

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows x (windows * B, N, C); mask is (windows, N, N)."""
        q, k, v = _with_biases(self, x)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)  # (heads, N, N)
        logits = logits + 16 * torch.sigmoid(bias)
        if mask is not None:
            logits = (logits.view(-1, len(mask), *logits.shape[1:]) + mask[:, None]).flatten(0, 1)
        mixed = self.attn_drop(logits.softmax(dim=-1)) @ v
        return _projected(self, mixed.transpose(1, 2).flatten(2))


class CutCrossCovariance(nn.Module):
    """XCiT's attention among the channels of each head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend within x (B, N, C)."""
        q, k, v = (part.transpose(-2, -1) for part in _split(self.qkv(x), 3, self.num_heads))  # (B, heads, width, N)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        mixed = self.attn_drop(logits.softmax(dim=-1)) @ v
        return _projected(self, mixed.permute(0, 3, 1, 2).flatten(2))


class CutClassAttention(nn.Module):
    """CaiT's class attention: the class token alone asks."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """What the class token (B, 1, C) gathers from x (B, N, C)."""
        asked = (self.q, x[:, :1]), (self.k, x), (self.v, x)
        q, k, v = (_split(layer(tokens), 1, self.num_heads)[0] for layer, tokens in asked)
        return _projected(self, _attend(self, q, k, v, fused=self.fused_attn))


class CutTalkingHeads(nn.Module):
    """CaiT's attention, whose heads mix before and after the softmax."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend within x (B, N, C)."""
        q, k, v = _split(self.qkv(x), 3, self.num_heads)
        logits = (q * self.scale @ k.transpose(-2, -1)).permute(0, 2, 3, 1)  # (B, N, N, heads)
        weights = self.proj_w(self.proj_l(logits).softmax(dim=-2)).permute(0, 3, 1, 2)
        return _projected(self, (self.attn_drop(weights) @ v).transpose(1, 2).flatten(2))


class CutConViT(nn.Module):
    """ConViT's plain attention."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend within x (B, N, C)."""
        q, k, v = _split(self.qkv(x), 3, self.num_heads)
        return _projected(self, _attend(self, q, k, v))


class CutPositional(nn.Module):
    """ConViT's gated positional attention."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend within x (B, N, C)."""
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = convit.GPSA.get_rel_indices(self, x.shape[1])
        q, k = _split(self.qk(x), 2, self.num_heads)
        (v,) = _split(self.v(x), 1, self.num_heads)
        content = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        place = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)  # (1, heads, N, N)
        gate = torch.sigmoid(self.gating_param).view(1, -1, 1, 1)
        weights = (1.0 - gate) * content + gate * place
        weights = self.attn_drop(weights / weights.sum(dim=-1, keepdim=True))
        return _projected(self, (weights @ v).transpose(1, 2).flatten(2))


class CutLocal(nn.Module):
    """Twins' attention within windows of a map."""

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend within x (B, N, C), whose tokens are a map of size (H, W)."""
        batch, (high, wide), side = len(x), size, self.ws
        grid = F.pad(x.view(batch, high, wide, -1), (0, 0, 0, -wide % side, 0, -high % side))
        rows, columns = grid.shape[1] // side, grid.shape[2] // side
        windows = grid.view(batch, rows, side, columns, side, -1).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        q, k, v = _split(self.qkv(windows), 3, self.num_heads)  # (B * rows * columns, heads, side * side, width)
        joined = _attend(self, q, k, v, fused=self.fused_attn).view(batch, rows, columns, side, side, -1)
        grid = joined.transpose(2, 3).reshape(batch, rows * side, columns * side, -1)[:, :high, :wide]
        return _projected(self, grid.flatten(1, 2))


class CutSubSampled(nn.Module):
    """Twins' attention to a map with fewer positions."""

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend within x (B, N, C), whose tokens are a map of size (H, W)."""
        (q,) = _split(self.q(x), 1, self.num_heads)
        if self.sr is not None:
            grid = x.transpose(1, 2).reshape(len(x), -1, *size)  # (B, C, H, W)
            x = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        k, v = _split(self.kv(x), 2, self.num_heads)
        return _projected(self, _attend(self, q, k, v, fused=self.fused_attn))


class CutRotary(nn.Module):
    """EVA's attention, whose queries and keys are turned by their positions."""

    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend within x (B, N, C); rope (N - prefix, 2 * width) is the sine and cosine of each position."""
        if self.qkv is None:
            q, k, v = (_split(layer(x), 1, self.num_heads)[0] for layer in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = _with_biases(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (_turned(self, part, rope).type_as(v) for part in (q, k))
        bias = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        mixed = _attend(self, q, k, v, bias, self.fused_attn)
        return _projected(self, mixed if self.gate is None else mixed * self.gate(x).sigmoid())


def _turned(attn: Any, part: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys (B, heads, N, width), but for prefix tokens, turned by their positions."""
    first = attn.num_prefix_tokens
    turned = apply_rot_embed_cat(part[:, :, first:], rope, half=attn.rotate_half)
    return torch.cat((part[:, :, :first], turned), dim=2)


NARROW: dict[type[nn.Module], type[nn.Module]] = {
    beit.Attention: CutBeit,
    cait.ClassAttn: CutClassAttention,
    cait.TalkingHeadAttn: CutTalkingHeads,
    convit.GPSA: CutPositional,
    convit.MHSA: CutConViT,
    eva.EvaAttention: CutRotary,
    swin_transformer_v2.WindowAttention: CutWindowV2,
    twins.GlobalSubSampleAttn: CutSubSampled,
    twins.LocallyGroupedAttn: CutLocal,
    xcit.XCA: CutCrossCovariance,
}
TIMM_CLASS = {narrow: wide for wide, narrow in NARROW.items()}


def set_forward_class(attn: Any, number: int, width: int) -> None:
    """Record heads of a width, and give an attention the forward that it needs: timm's wherever that one fits.

    Only the class changes, not the object: its weights, their names and who refers to it stay.
    """
    wide = TIMM_CLASS.get(type(attn), type(attn))
    attn.__class__ = wide if number * width == attn.proj.out_features else NARROW[wide]
