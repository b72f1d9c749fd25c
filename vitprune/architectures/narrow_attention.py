"""Forward passes of torch's and torchvision's attentions for any width of heads: their reshapes are in functions.

The original forward passes assume that the concatenated heads have the width of the input. The classes here have the
same parameters under the same names, and take the width from them. Only the `__class__` of an attention is changed, so
all references to the module remain valid. Other classes are rewritten, see `inferred_widths`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as torchvision_swin


def _split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split (B, N, parts * heads * head_dim) into `parts` tensors (B, heads, N, head_dim)."""
    batch, tokens, _ = projected.shape
    return projected.view(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


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

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Keep torch.nn.TransformerEncoderLayer from its fused kernel, which takes no other width either."""
        return False

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


class TwoWidthAttention(Attention):  # type: ignore[misc]
    """timm's attention whose queries and keys have another width than its values."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute attention of x (B, N, C), as timm's; `attn_mask` is boolean or added to the logits."""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        widths = [key_rows(self), key_rows(self), self.proj.in_features]
        q, k, v = (_split(part, 1, self.num_heads)[0] for part in self.qkv(x).split(widths, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        output = self.norm(mixed.transpose(1, 2).flatten(2))
        output = self.proj(output if gate is None else output * gate)
        return self.proj_drop(output)  # type: ignore[no-any-return]


def key_rows(attention: Any) -> int:
    """Return the number of rows of the keys, and of the queries, in the fused layer of timm's attention."""
    return int(attention.qkv.out_features - attention.proj.in_features) // 2


BY_HAND: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: NarrowMultiheadAttention,
    torchvision_swin.ShiftedWindowAttention: NarrowShiftedWindows,
    torchvision_swin.ShiftedWindowAttentionV2: NarrowShiftedWindowsV2,
}


TWO_WIDTHS: dict[type[nn.Module], type[nn.Module]] = {Attention: TwoWidthAttention}


def narrow_class(module: nn.Module, two_widths: bool = False) -> type[nn.Module]:
    """Return the class of a module with a forward pass for any width.

    Args:
        module: Any module.
        two_widths: The width of queries and keys differs from that of values.

    Returns:
        The class written by hand; the class of the module if there is none.
    """
    return (TWO_WIDTHS if two_widths else BY_HAND).get(type(module), type(module))


def call_output_projections(model: nn.Module) -> None:
    """Let attentions call their output projection as a module, so that its inputs can be recorded.

    torch's MultiheadAttention and torchvision's Swin read its weight instead. Their classes become those of any width,
    which compute the same; `restore_classes` undoes it.
    """
    for module in model.modules():
        module.__class__ = narrow_class(module)


def restore_classes(model: nn.Module) -> None:
    """Undo `call_output_projections` for all attentions whose heads have not been cut."""
    for module in model.modules():
        stock = next((kind for kind, by_hand in BY_HAND.items() if type(module) is by_hand), None)
        output = getattr(module, "out_proj", getattr(module, "proj", None))
        if stock is not None and isinstance(output, nn.Linear) and output.in_features == output.out_features:
            module.__class__ = stock
