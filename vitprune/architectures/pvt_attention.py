"""PVTv2's attention for widths that timm's own forward has no words for."""

from typing import Any

from timm.models.pvt_v2 import Attention
from torch import Tensor, nn
from torch.nn import functional as F


class CutAttention(nn.Module):
    """timm's PVTv2 attention, where heads and spatial reduction may be narrower than the stream around them.

    The weights are timm's by name and meaning. timm's forward joins the heads, and reads the reduced map, at the width
    of its input; this one does at their own.
    """

    def forward(self: Any, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Attend within a stream x (B, N, C), whose tokens are a map of feat_size (H, W)."""
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)  # (B, heads, N, head_dim)
        kv = self.kv(_reduced(self, x, feat_size))
        k, v = kv.reshape(batch, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        joined: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return joined


def _reduced(attn: Any, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
    """What keys and values are made of: the stream, or its map with fewer positions (B, M, channels of sr)."""
    if attn.sr is None:
        return x
    grid = x.transpose(1, 2).reshape(len(x), -1, *feat_size)  # (B, C, H, W)
    grid = attn.sr(grid if attn.pool is None else attn.pool(grid))
    reduced: Tensor = attn.norm(grid.flatten(2).transpose(1, 2))
    return reduced if attn.act is None else attn.act(reduced)


def set_pvt_forward_class(attn: Any) -> None:
    """Give an attention the forward that its widths need: timm's own wherever they are all the same.

    Only the class changes, not the object: its weights, their names and who refers to it stay, and a model back at
    timm's shapes is timm's again.
    """
    attn.dim = attn.q.in_features
    widths = {attn.dim, attn.proj.in_features} | ({attn.sr.out_channels} if attn.sr is not None else set())
    attn.__class__ = Attention if len(widths) == 1 else CutAttention
