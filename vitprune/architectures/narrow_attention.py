"""Forward passes of attentions for num_heads * head_dim != embed_dim, which their libraries do not support.

The original forward passes assume that the concatenated heads have the width of the input. The classes here have the
same parameters under the same names, and take the width from them. They inherit the other methods, such as
set_window_size. Only the `__class__` of an attention is changed, so all references to the module remain valid.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat, resolve_self_attn_mask
from timm.models import beit, cait, convit, eva, pvt_v2, swin_transformer_v2, twins, xcit
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as torchvision_swin


def _split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split (B, N, parts * heads * head_dim) into `parts` tensors (B, heads, N, head_dim)."""
    batch, tokens, _ = projected.shape
    return projected.view(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, fused: bool = False) -> Tensor:
    """Return softmax(scale * q k^T + bias) v with the heads concatenated: (B, N, heads * head_dim)."""
    if fused:
        dropout = attn.attn_drop.p if attn.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
    else:
        logits = q * attn.scale @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        mixed = attn.attn_drop(weights) @ v
    return mixed.transpose(1, 2).flatten(2)


def _project_output(attn: Any, heads: Tensor) -> Tensor:
    out: Tensor = attn.proj_drop(attn.proj(heads))
    return out


def _split_qkv(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v of an attention whose biases are parameters outside the qkv layer."""
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return _split(F.linear(x, attn.qkv.weight, bias), 3, attn.num_heads)


class NarrowBeitAttention(beit.Attention):  # type: ignore[misc]
    """BEiT's attention with relative position bias."""

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Compute self-attention of x (B, N, C)."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            table_bias = self._get_rel_pos_bias()
            bias = table_bias if bias is None else table_bias + bias
        q, k, v = _split_qkv(self, x)
        return _project_output(self, _attend(self, q, k, v, bias, self.fused_attn))


class NarrowWindowAttentionV2(swin_transformer_v2.WindowAttention):  # type: ignore[misc]
    """Swin V2's cosine attention; its logits do not depend on head_dim."""

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute self-attention in windows x (B * windows, N, C); mask is (windows, N, N)."""
        q, k, v = _split_qkv(self, x)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        area = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)  # (heads, N, N)
        logits = logits + 16 * torch.sigmoid(bias)
        if mask is not None:
            logits = (logits.view(-1, len(mask), *logits.shape[1:]) + mask[:, None]).flatten(0, 1)
        mixed = self.attn_drop(logits.softmax(dim=-1)) @ v
        return _project_output(self, mixed.transpose(1, 2).flatten(2))


class NarrowCrossCovariance(xcit.XCA):  # type: ignore[misc]
    """XCiT's cross-covariance attention: attention between the channels of a head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Compute self-attention of x (B, N, C)."""
        q, k, v = (part.transpose(-2, -1) for part in _split(self.qkv(x), 3, self.num_heads))  # (B, heads, head_dim, N)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        mixed = self.attn_drop(logits.softmax(dim=-1)) @ v
        return _project_output(self, mixed.permute(0, 3, 1, 2).flatten(2))


class NarrowClassAttention(cait.ClassAttn):  # type: ignore[misc]
    """CaiT's class attention: the class token is the only query."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the attention output of the class token, (B, 1, C); x is (B, N, C)."""
        inputs = (self.q, x[:, :1]), (self.k, x), (self.v, x)
        q, k, v = (_split(layer(tokens), 1, self.num_heads)[0] for layer, tokens in inputs)
        return _project_output(self, _attend(self, q, k, v, fused=self.fused_attn))


class NarrowTalkingHeads(cait.TalkingHeadAttn):  # type: ignore[misc]
    """CaiT's talking-heads attention, which mixes the heads before and after the softmax."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Compute self-attention of x (B, N, C)."""
        q, k, v = _split(self.qkv(x), 3, self.num_heads)
        logits = (q * self.scale @ k.transpose(-2, -1)).permute(0, 2, 3, 1)  # (B, N, N, heads)
        weights = self.proj_w(self.proj_l(logits).softmax(dim=-2)).permute(0, 3, 1, 2)
        return _project_output(self, (self.attn_drop(weights) @ v).transpose(1, 2).flatten(2))


class NarrowConVitAttention(convit.MHSA):  # type: ignore[misc]
    """ConViT's self-attention without positions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Compute self-attention of x (B, N, C)."""
        q, k, v = _split(self.qkv(x), 3, self.num_heads)
        return _project_output(self, _attend(self, q, k, v))


class NarrowPositionalAttention(convit.GPSA):  # type: ignore[misc]
    """ConViT's gated positional attention."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Compute self-attention of x (B, N, C)."""
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        q, k = _split(self.qk(x), 2, self.num_heads)
        (v,) = _split(self.v(x), 1, self.num_heads)
        content = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        positional = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)  # (1, heads, N, N)
        gate = torch.sigmoid(self.gating_param).view(1, -1, 1, 1)
        weights = (1.0 - gate) * content + gate * positional
        weights = self.attn_drop(weights / weights.sum(dim=-1, keepdim=True))
        return _project_output(self, (weights @ v).transpose(1, 2).flatten(2))


class NarrowLocalAttention(twins.LocallyGroupedAttn):  # type: ignore[misc]
    """Twins' attention in the windows of a feature map."""

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Compute attention of x (B, N, C), the tokens of a feature map of size (H, W)."""
        batch, (height, width), side = len(x), size, self.ws
        grid = F.pad(x.view(batch, height, width, -1), (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = grid.shape[1] // side, grid.shape[2] // side
        windows = grid.view(batch, rows, side, columns, side, -1).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        q, k, v = _split(self.qkv(windows), 3, self.num_heads)  # (B * rows * columns, heads, side * side, head_dim)
        heads = _attend(self, q, k, v, fused=self.fused_attn).view(batch, rows, columns, side, side, -1)
        grid = heads.transpose(2, 3).reshape(batch, rows * side, columns * side, -1)[:, :height, :width]
        return _project_output(self, grid.flatten(1, 2))


class NarrowSubSampledAttention(twins.GlobalSubSampleAttn):  # type: ignore[misc]
    """Twins' attention with keys and values of a spatially reduced feature map."""

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Compute attention of x (B, N, C), the tokens of a feature map of size (H, W)."""
        (q,) = _split(self.q(x), 1, self.num_heads)
        if self.sr is not None:
            grid = x.transpose(1, 2).reshape(len(x), -1, *size)  # (B, C, H, W)
            x = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        k, v = _split(self.kv(x), 2, self.num_heads)
        return _project_output(self, _attend(self, q, k, v, fused=self.fused_attn))


class NarrowRotaryAttention(eva.EvaAttention):  # type: ignore[misc]
    """EVA's attention with rotary position embedding."""

    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute self-attention of x (B, N, C); rope (N - prefix, 2 * head_dim) holds sine and cosine per position."""
        if self.qkv is None:
            q, k, v = (_split(layer(x), 1, self.num_heads)[0] for layer in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q, k, v = _split_qkv(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (_rotate(self, part, rope).type_as(v) for part in (q, k))
        bias = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        mixed = _attend(self, q, k, v, bias, self.fused_attn)
        return _project_output(self, mixed if self.gate is None else mixed * self.gate(x).sigmoid())


def _rotate(attn: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotary embedding to queries or keys (B, heads, N, head_dim), except to the prefix tokens."""
    first = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(heads[:, :, first:], rope, half=attn.rotate_half)
    return torch.cat((heads[:, :, :first], rotated), dim=2)


class NarrowPvtAttention(pvt_v2.Attention):  # type: ignore[misc]
    """PVTv2's attention; the spatially reduced map may also be narrower than the input."""

    def forward(self: Any, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Compute attention of x (B, N, C), the tokens of a feature map of size (H, W)."""
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)  # (B, heads, N, head_dim)
        kv = self.kv(_reduce_map(self, x, feat_size))
        k, v = kv.reshape(batch, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return _project_output(self, x.transpose(1, 2).flatten(2))


def _reduce_map(attn: Any, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
    """Return the input of keys and values: x, or its spatially reduced map (B, M, channels of sr)."""
    if attn.sr is None:
        return x
    grid = x.transpose(1, 2).reshape(len(x), -1, *feat_size)  # (B, C, H, W)
    grid = attn.sr(grid if attn.pool is None else attn.pool(grid))
    reduced: Tensor = attn.norm(grid.flatten(2).transpose(1, 2))
    return reduced if attn.act is None else attn.act(reduced)


def _attend_in_shifted_windows(self: Any, x: Tensor) -> Tensor:
    """Compute attention of torchvision's Swin in the windows of x (B, H, W, C)."""
    window, size = self.window_size, x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, -size[1] % window[1], 0, -size[0] % window[0]))
    whole = padded.shape[1:3]
    shift = [0 if side >= total else step for side, total, step in zip(window, whole, self.shift_size, strict=True)]
    windows = _windows(padded.roll([-step for step in shift], (1, 2)), window)  # (B, windows, N, C)
    projected, bias = self.qkv(windows.flatten(0, 1)), self.qkv.bias
    if hasattr(self, "logit_scale") and bias is not None:  # Swin V2's keys have no bias
        zero = torch.zeros_like(bias)
        projected = projected - torch.cat([zero.chunk(3)[0], bias.chunk(3)[1], zero.chunk(3)[2]])
    q, k, v = _split(projected, 3, self.num_heads)
    if hasattr(self, "logit_scale"):
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
    else:
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    logits = logits + self.get_relative_position_bias()
    if any(shift):
        parts = [_parts(total, side, step, x) for total, side, step in zip(whole, window, shift, strict=True)]
        regions = _windows((3 * parts[0][:, None] + parts[1])[None, :, :, None], window)[0, :, :, 0]  # (windows, N)
        other = regions[:, :, None] != regions[:, None]
        logits = (logits.view(len(x), -1, *logits.shape[1:]) - 100.0 * other[:, None]).flatten(0, 1)
    shares = F.dropout(logits.softmax(dim=-1), self.attention_dropout, self.training)
    output = F.dropout(self.proj((shares @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)
    rows, columns = whole[0] // window[0], whole[1] // window[1]
    grid = output.view(len(x), rows, columns, *window, -1).transpose(2, 3).reshape(len(x), *whole, -1)
    return grid.roll(shift, (1, 2))[:, : size[0], : size[1]]


def _windows(grid: Tensor, window: Sequence[int]) -> Tensor:
    """Split (B, H, W, C) into windows (B, windows, tokens of a window, C)."""
    batch, height, width, channels = grid.shape
    parts = grid.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _parts(total: int, side: int, step: int, like: Tensor) -> Tensor:
    """Number of the part, 0 to 2, that every row of a shifted map comes from."""
    rows = torch.arange(total, device=like.device)
    return (rows >= total - side).long() + (rows >= total - step).long() if step else torch.zeros_like(rows)


class NarrowShiftedWindows(torchvision_swin.ShiftedWindowAttention):  # type: ignore[misc]
    """torchvision's Swin attention."""

    forward = _attend_in_shifted_windows


class NarrowShiftedWindowsV2(torchvision_swin.ShiftedWindowAttentionV2):  # type: ignore[misc]
    """torchvision's Swin V2 attention."""

    forward = _attend_in_shifted_windows


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """torch's multi-head attention with fused input projection; torch's own takes no other width than embed_dim."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention of query (B, N, C), or (N, B, C) if not `batch_first`; as torch.nn.MultiheadAttention."""
        inputs = [query, key, value]
        if not self.batch_first:
            inputs = [part.transpose(0, 1) for part in inputs]
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = [F.linear(*given) for given in zip(inputs, weights, biases, strict=True)]
        q, k, v = (_split(part, 1, self.num_heads)[0] for part in projected)
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, N, M)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
            if mask is not None:
                logits = logits.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        shares = logits.softmax(dim=-1)
        mixed = F.dropout(shares, self.dropout, self.training) @ v
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, shares.mean(dim=1) if average_attn_weights else shares


PRUNED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    beit.Attention: NarrowBeitAttention,
    cait.ClassAttn: NarrowClassAttention,
    cait.TalkingHeadAttn: NarrowTalkingHeads,
    convit.GPSA: NarrowPositionalAttention,
    convit.MHSA: NarrowConVitAttention,
    eva.EvaAttention: NarrowRotaryAttention,
    swin_transformer_v2.WindowAttention: NarrowWindowAttentionV2,
    twins.GlobalSubSampleAttn: NarrowSubSampledAttention,
    twins.LocallyGroupedAttn: NarrowLocalAttention,
    xcit.XCA: NarrowCrossCovariance,
}
TIMM_CLASS = {pruned: stock for stock, pruned in PRUNED_CLASS.items()}


NARROW_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    **PRUNED_CLASS,
    nn.MultiheadAttention: NarrowMultiheadAttention,
    pvt_v2.Attention: NarrowPvtAttention,
    torchvision_swin.ShiftedWindowAttention: NarrowShiftedWindows,
    torchvision_swin.ShiftedWindowAttentionV2: NarrowShiftedWindowsV2,
}


def narrow_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module with a forward pass for any width; its own class if there is none in the table."""
    return NARROW_CLASS.get(type(module), type(module))


def set_forward_class(attn: Any, num_heads: int, head_dim: int) -> None:
    """Set the class of an attention to timm's if num_heads * head_dim is its embed_dim, else to the class from here.

    Only `__class__` changes: parameters, their names and references to the module remain valid.
    """
    stock = TIMM_CLASS.get(type(attn), type(attn))
    attn.__class__ = stock if num_heads * head_dim == attn.proj.out_features else PRUNED_CLASS[stock]


def set_pvt_forward_class(attn: Any) -> None:
    """Set `dim` of a PVTv2 attention, and its class to timm's if all its widths are equal to `dim`."""
    attn.dim = attn.q.in_features
    widths = {attn.dim, attn.proj.in_features} | ({attn.sr.out_channels} if attn.sr is not None else set())
    attn.__class__ = pvt_v2.Attention if len(widths) == 1 else NarrowPvtAttention


UNCALLED = (nn.MultiheadAttention, torchvision_swin.ShiftedWindowAttention, torchvision_swin.ShiftedWindowAttentionV2)


def call_output_projections(model: nn.Module) -> None:
    """Let attentions call their output projection as a module, so that its inputs can be recorded.

    torch's MultiheadAttention and torchvision's Swin read its weight instead. Their classes become those of any width,
    which compute the same; `restore_classes` undoes it.
    """
    for module in model.modules():
        if type(module) in UNCALLED:
            module.__class__ = NARROW_CLASS[type(module)]


def restore_classes(model: nn.Module) -> None:
    """Undo `call_output_projections` for all attentions whose heads have not been cut."""
    for module in model.modules():
        stock = next((kind for kind in UNCALLED if type(module) is NARROW_CLASS[kind]), None)
        output = getattr(module, "out_proj", getattr(module, "proj", None))
        if stock is not None and isinstance(output, nn.Linear) and output.in_features == output.out_features:
            module.__class__ = stock
