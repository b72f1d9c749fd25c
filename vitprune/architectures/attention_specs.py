"""Table AttentionSpec per timm attention class: the layers that write and read the heads, and parameters per head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.layers import Attention, AttentionRope, RelPosBias, RelPosBiasTf, RelPosMlp, RotaryEmbeddingMixed
from timm.models import (
    beit,
    cait,
    coat,
    convit,
    efficientformer,
    eva,
    levit,
    maxxvit,
    mobilevit,
    mvitv2,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    tiny_vit,
    twins,
    xcit,
)
from torch import nn

from vitprune.architectures.narrow_attention import (
    PRUNED_CLASS,
    NarrowPvtAttention,
    set_forward_class,
    set_pvt_forward_class,
)

DIFFERENT_WIDTHS = "its keys and values differ in width, so a channel of one is no channel of the other"
NORM_PER_HEAD = "a norm over the head couples its channels"
NORM_OVER_HEADS = "a norm over all heads couples them"
ROTARY = "rotary positions rotate its channels in pairs, by angles that all heads and blocks share"
SetSizes = Callable[[Any, int, int], None]  # (attention, num_heads, head_dim)


@dataclass(frozen=True)
class AttentionSpec:
    """Layout of the heads of an attention class.

    Attributes:
        writers: layers and parameters whose rows belong to heads, with the number of times that all heads are repeated
            along the rows (3 for a fused qkv). The first rows of the first one are the queries.
        reader: the layer that reads the concatenated heads.
        per_head: parameters and layers with one entry per head, with the axis of heads.
        blocks_heads: modules that make the heads inseparable if they are present, with the reason.
        blocks_channels: modules that make the channels of a head inseparable if they are present, with the reason.
        channels_refused: reason why the channels of heads can never be pruned; empty if they can.
        scaled: whether the attention logits are scaled by head_dim ** -0.5.
        head_major: whether q, k and v of one head come before those of the next head.
        set_sizes: function that records a new number of heads and a new head_dim in the module.
    """

    writers: tuple[tuple[str, int], ...] = (("qkv", 3),)
    reader: str = "proj"
    per_head: tuple[tuple[str, int], ...] = ()
    blocks_heads: Mapping[str, str] = field(default_factory=dict)
    blocks_channels: Mapping[str, str] = field(default_factory=dict)
    channels_refused: str = ""
    scaled: bool = True
    head_major: bool = False
    set_sizes: SetSizes = set_forward_class


def _plain(attn: Any, num_heads: int, head_dim: int) -> None:
    attn.head_dim, attn.attn_dim = head_dim, num_heads * head_dim


def _no_sizes(attn: Any, num_heads: int, head_dim: int) -> None:
    """Record nothing: the forward pass reads num_heads alone."""


def _rotary(attn: Any, num_heads: int, head_dim: int) -> None:
    attn.num_kv_heads, attn.kv_dim = num_heads, num_heads * head_dim
    attn.attn_dim = num_heads * head_dim


def _levit(attn: Any, num_heads: int, head_dim: int) -> None:
    _levit_keys(attn, head_dim)
    attn.key_attn_dim, attn.val_attn_dim = num_heads * attn.key_dim, num_heads * attn.val_dim


def _tiny(attn: Any, num_heads: int, head_dim: int) -> None:
    _levit_keys(attn, head_dim)
    attn.out_dim = num_heads * attn.val_dim


def _levit_keys(attn: Any, head_dim: int) -> None:
    attn.key_dim, attn.val_dim = head_dim if attn.key_dim == attn.val_dim else attn.key_dim, head_dim
    attn.attention_bias_cache = {}


def _multiscale(attn: Any, num_heads: int, head_dim: int) -> None:
    attn.dim_out = num_heads * head_dim


def _partitioned(attn: Any, num_heads: int, head_dim: int) -> None:
    attn.dim_head, bias = head_dim, attn.rel_pos
    if isinstance(bias, RelPosBias | RelPosMlp):
        bias.bias_shape = (*bias.bias_shape[:2], num_heads)
    if isinstance(bias, RelPosBiasTf):
        bias.bias_shape = (num_heads, *bias.bias_shape[1:])
    if isinstance(bias, RelPosMlp | RelPosBiasTf):
        bias.num_heads = num_heads


def _pvt(attn: Any, num_heads: int, head_dim: int) -> None:
    attn.head_dim = head_dim
    set_pvt_forward_class(attn)


BIASES = (("q_bias", 1), ("k_bias", 1), ("v_bias", 1))
TABLE = ("relative_position_bias_table", 1)
LEVIT = AttentionSpec(
    (("qkv", 1),), "proj.ln", (("attention_biases", 0),), scaled=False, head_major=True, set_sizes=_levit
)
PARTITIONED = AttentionSpec(per_head=(("rel_pos", 0),), set_sizes=_partitioned)
PVT = AttentionSpec((("q", 1), ("kv", 2)), set_sizes=_pvt)
ROTATED = (("qkv", 3), *((f"{name}_proj", 1) for name in "qkv"), *BIASES, ("gate", 1))
NORMS = {"q_norm": NORM_PER_HEAD, "k_norm": NORM_PER_HEAD}

SPECS: dict[type[nn.Module], AttentionSpec] = {
    Attention: AttentionSpec(
        blocks_heads={"norm": NORM_OVER_HEADS, "gate": "gated attention is not understood here"},
        blocks_channels=NORMS,
        set_sizes=_plain,
    ),
    AttentionRope: AttentionSpec(
        ROTATED, blocks_heads={"norm": NORM_OVER_HEADS}, channels_refused=ROTARY, set_sizes=_rotary
    ),
    eva.EvaAttention: AttentionSpec(ROTATED, blocks_heads={"norm": NORM_OVER_HEADS}, channels_refused=ROTARY),
    beit.Attention: AttentionSpec((("qkv", 3), *BIASES), per_head=(TABLE,)),
    cait.ClassAttn: AttentionSpec((("q", 1), ("k", 1), ("v", 1))),
    cait.TalkingHeadAttn: AttentionSpec(per_head=(("proj_l", 0), ("proj_l", 1), ("proj_w", 0), ("proj_w", 1))),
    convit.GPSA: AttentionSpec((("qk", 2), ("v", 1)), per_head=(("pos_proj", 0), ("gating_param", 0))),
    convit.MHSA: AttentionSpec(),
    efficientformer.Attention: AttentionSpec(
        (("qkv", 1),), per_head=(("attention_biases", 0),), scaled=False, head_major=True, set_sizes=_levit
    ),
    levit.Attention: LEVIT,
    levit.AttentionDownsample: AttentionSpec(
        (("kv", 1), ("q.ln", 1)), "proj.ln", (("attention_biases", 0),), scaled=False, head_major=True, set_sizes=_levit
    ),
    maxxvit.Attention2d: PARTITIONED,
    maxxvit.AttentionCl: PARTITIONED,
    mvitv2.MultiScaleAttention: AttentionSpec(
        channels_refused="pooling shares its weights, norms and position tables among heads, over the same channels",
        set_sizes=_multiscale,
    ),
    pvt_v2.Attention: PVT,
    swin_transformer.WindowAttention: AttentionSpec(per_head=(TABLE,), set_sizes=_no_sizes),
    swin_transformer_v2.WindowAttention: AttentionSpec(
        (("qkv", 3), *BIASES), per_head=(("logit_scale", 0), ("cpb_mlp.2", 0)), scaled=False
    ),
    tiny_vit.Attention: AttentionSpec(
        (("qkv", 1),), per_head=(("attention_biases", 0),), head_major=True, set_sizes=_tiny
    ),
    twins.GlobalSubSampleAttn: AttentionSpec((("q", 1), ("kv", 2))),
    twins.LocallyGroupedAttn: AttentionSpec(),
    xcit.XCA: AttentionSpec(
        per_head=(("temperature", 0),),
        channels_refused="its softmax runs over the channels of a head",
    ),
}
SPECS |= {pruned: SPECS[stock] for stock, pruned in PRUNED_CLASS.items()} | {NarrowPvtAttention: PVT}

REFUSED: dict[type[nn.Module], str] = {
    RotaryEmbeddingMixed: "each head of each block has angles of its own",
    coat.ConvRelPosEnc: "the blocks of a stage share it, and its convolutions split the heads by window size",
    coat.FactorAttnConvRelPosEnc: "the blocks of a stage share one position encoding, whose heads differ in window",
    mobilevit.LinearSelfAttention: "it has no heads, and a single row of queries",
}
