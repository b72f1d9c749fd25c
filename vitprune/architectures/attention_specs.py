"""Where every attention that we know keeps its heads: which layers write them, and what each head has of its own."""

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

from vitprune.architectures import narrow_attention as cut
from vitprune.architectures.pvt_attention import CutAttention
from vitprune.architectures.pvt_attention import set_pvt_forward_class as settle_pvt

UNLIKE = "its keys and values differ in width, so a channel is not one of each"
COUPLED = "a norm over the head couples its channels"
JOINED = "a norm over all heads couples them"
ROTARY = "where positions are rotary, they turn its channels two by two, by angles that all heads and blocks share"
Sizes = Callable[[Any, int, int], None]


@dataclass(frozen=True)
class AttentionSpec:
    """Where an attention keeps its heads.

    `rows` names what has channels by head, and how many times over; the first rows of the first are q. `reader` reads
    the joined heads, and `own` has one entry per head along an axis. What is in `whole` must be missing for heads to
    go, and what is in `apart` for channels to go, for the reason given; `channels` is a reason why they never can.
    `sizes` records a number of heads and their width; `scaled` says that logits are scaled by the width, and
    `side_by_side` that q, k and v of one head lie together, before those of the next.
    """

    rows: tuple[tuple[str, int], ...] = (("qkv", 3),)
    reader: str = "proj"
    own: tuple[tuple[str, int], ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    channels: str = ""
    scaled: bool = True
    side_by_side: bool = False
    sizes: Sizes = cut.set_forward_class


def _plain(attn: Any, number: int, width: int) -> None:
    attn.head_dim, attn.attn_dim = width, number * width


def _rotary(attn: Any, number: int, width: int) -> None:
    attn.num_kv_heads, attn.kv_dim = number, number * width
    attn.attn_dim = number * width


def _levit(attn: Any, number: int, width: int) -> None:
    _keys(attn, width)
    attn.key_attn_dim, attn.val_attn_dim = number * attn.key_dim, number * attn.val_dim


def _tiny(attn: Any, number: int, width: int) -> None:
    _keys(attn, width)
    attn.out_dim = number * attn.val_dim


def _keys(attn: Any, width: int) -> None:
    attn.key_dim, attn.val_dim = width if attn.key_dim == attn.val_dim else attn.key_dim, width
    attn.attention_bias_cache = {}


def _multiscale(attn: Any, number: int, width: int) -> None:
    attn.dim_out = number * width


def _partitioned(attn: Any, number: int, width: int) -> None:
    attn.dim_head, bias = width, attn.rel_pos
    if isinstance(bias, RelPosBias | RelPosMlp):
        bias.bias_shape = (*bias.bias_shape[:2], number)
    if isinstance(bias, RelPosBiasTf):
        bias.bias_shape = (number, *bias.bias_shape[1:])
    if isinstance(bias, RelPosMlp | RelPosBiasTf):
        bias.num_heads = number


def _pvt(attn: Any, number: int, width: int) -> None:
    attn.head_dim = width
    settle_pvt(attn)


BIASES = (("q_bias", 1), ("k_bias", 1), ("v_bias", 1))
TABLE = ("relative_position_bias_table", 1)
LEVIT = AttentionSpec(
    (("qkv", 1),), "proj.ln", (("attention_biases", 0),), scaled=False, side_by_side=True, sizes=_levit
)
PARTITIONED = AttentionSpec(own=(("rel_pos", 0),), sizes=_partitioned)
PVT = AttentionSpec((("q", 1), ("kv", 2)), sizes=_pvt)
ROTATED = (("qkv", 3), *((f"{name}_proj", 1) for name in "qkv"), *BIASES, ("gate", 1))
NORMS = {"q_norm": COUPLED, "k_norm": COUPLED}

HEADS: dict[type[nn.Module], AttentionSpec] = {
    Attention: AttentionSpec(
        whole={"norm": JOINED, "gate": "gated attention is not understood here"},
        apart=NORMS,
        sizes=_plain,
    ),
    AttentionRope: AttentionSpec(ROTATED, whole={"norm": JOINED}, channels=ROTARY, sizes=_rotary),
    eva.EvaAttention: AttentionSpec(ROTATED, whole={"norm": JOINED}, channels=ROTARY),
    beit.Attention: AttentionSpec((("qkv", 3), *BIASES), own=(TABLE,)),
    cait.ClassAttn: AttentionSpec((("q", 1), ("k", 1), ("v", 1))),
    cait.TalkingHeadAttn: AttentionSpec(own=(("proj_l", 0), ("proj_l", 1), ("proj_w", 0), ("proj_w", 1))),
    convit.GPSA: AttentionSpec((("qk", 2), ("v", 1)), own=(("pos_proj", 0), ("gating_param", 0))),
    convit.MHSA: AttentionSpec(),
    efficientformer.Attention: AttentionSpec(
        (("qkv", 1),), own=(("attention_biases", 0),), scaled=False, side_by_side=True, sizes=_levit
    ),
    levit.Attention: LEVIT,
    levit.AttentionDownsample: AttentionSpec(
        (("kv", 1), ("q.ln", 1)), "proj.ln", (("attention_biases", 0),), scaled=False, side_by_side=True, sizes=_levit
    ),
    maxxvit.Attention2d: PARTITIONED,
    maxxvit.AttentionCl: PARTITIONED,
    mvitv2.MultiScaleAttention: AttentionSpec(
        channels="pooling shares its weights, norms and position tables among heads, over the same channels",
        sizes=_multiscale,
    ),
    pvt_v2.Attention: PVT,
    swin_transformer.WindowAttention: AttentionSpec(own=(TABLE,), sizes=_plain),
    swin_transformer_v2.WindowAttention: AttentionSpec(
        (("qkv", 3), *BIASES), own=(("logit_scale", 0), ("cpb_mlp.2", 0)), scaled=False
    ),
    tiny_vit.Attention: AttentionSpec((("qkv", 1),), own=(("attention_biases", 0),), side_by_side=True, sizes=_tiny),
    twins.GlobalSubSampleAttn: AttentionSpec((("q", 1), ("kv", 2))),
    twins.LocallyGroupedAttn: AttentionSpec(),
    xcit.XCA: AttentionSpec(
        own=(("temperature", 0),), channels="attention among channels: its softmax runs over those of a head"
    ),
}
HEADS |= {narrow: HEADS[wide] for wide, narrow in cut.NARROW.items()} | {CutAttention: PVT}

CLOSED: dict[type[nn.Module], str] = {
    RotaryEmbeddingMixed: "each head of each block has angles of its own in it",
    coat.ConvRelPosEnc: "the blocks of a stage share it, and its convolutions split the heads by window",
    coat.FactorAttnConvRelPosEnc: "the blocks of a stage share one position encoding, whose heads differ in window",
    mobilevit.LinearSelfAttention: "it has no heads, and one row of queries before those of its channels",
}
