"""Groups of single modules: hidden units of MLPs, and attention narrower than its residual stream."""

import copy

import pytest
import timm
import torch
from timm.layers import AttentionRope, GatedMlp, GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaAttention
from timm.models.levit import LevitMlp
from timm.models.twins import GlobalSubSampleAttn
from torch import nn

from tests.support.model_zoo import SMALL
from vitprune import BadInput, find_groups, shrink, zero
from vitprune.architectures import resize_to_structure
from vitprune.architectures.traced_groups import left_out
from vitprune.evaluation.check_model import make_test_model, random_odd_masks
from vitprune.evaluation.check_removal import expected_removals
from vitprune.runtime.random_parameters import randomize_parameters


class Host(nn.Module):
    """One module between two layers, applied to the pixels of an image of 6 channels."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.before, self.part, self.after = nn.Linear(6, 12), part, nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.part(self.before(x.flatten(2).mT)))


@pytest.mark.parametrize(
    ("part", "units", "slices", "buffers"),
    [
        (Mlp(12, 16), 16, 3, 0),
        (Mlp(12, 16, bias=False), 16, 2, 0),
        (GluMlp(12, 32), 16, 3, 0),
        (GluMlp(12, 32, gate_last=False), 16, 3, 0),
        (SwiGLU(12, 16), 16, 5, 0),
        (GatedMlp(12, 16), 16, 3, 0),
        (LevitMlp(12, 16), 16, 4, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hidden_units_of_a_single_mlp(part: nn.Module, units: int, slices: int, buffers: int) -> None:
    model = randomize_parameters(Host(part))
    x = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (group,) = find_groups(model, ["ffn"], x)
    assert (group.name, group.shape, len(group.slices), len(group.buffers)) == ("part", (units,), slices, buffers)
    masks = random_odd_masks([group], 0.4)
    zeroed, shrunk = zero(copy.deepcopy(model), [group], masks), shrink(copy.deepcopy(model), [group], masks)
    torch.testing.assert_close(shrunk(x), zeroed(x), rtol=0, atol=1e-12)
    assert (zeroed(x) - model(x)).abs().max() > 1e-3
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in shrunk.parameters())
    assert removed == sum(expected_removals(model, [group], masks).values()) > 0


def test_batch_norm_statistics_are_cut_with_their_units() -> None:
    model = randomize_parameters(Host(LevitMlp(12, 16)))
    (group,) = find_groups(model, ["ffn"], torch.zeros(1, 6, 3, 3))
    masks = {"part": torch.arange(16) != 3}
    mean = model.part.ln1.bn.running_mean.clone()
    zero(model, [group], masks)
    assert torch.equal(model.part.ln1.bn.running_mean, mean)
    assert not model.part.ln1(model.before(torch.randn(2, 9, 6, dtype=torch.float64)))[..., 3].any()
    shrink(model, [group], masks)
    norm = model.part.ln1.bn
    assert torch.equal(norm.running_mean, mean[torch.arange(16) != 3])
    assert (norm.num_features, len(norm.running_var), isinstance(norm.running_var, nn.Parameter)) == (15, 15, False)
    with pytest.raises(BadInput, match=r"^part.ln1.bn.bias: axis 0 is 15 long, the group is out of date"):
        zero(model, [group], masks)


class OtherMlp(Mlp):
    """The same MLP as another class."""


class SoftMlp(Mlp):
    """An MLP with a softmax over its hidden units."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).softmax(dim=-1))


def with_mlp(kind: type[Mlp]) -> nn.Module:
    model = timm.create_model("beit_base_patch16_224", **SMALL["beit_base_patch16_224"])
    model.blocks[1].mlp.__class__ = kind
    return model


def test_the_class_of_an_mlp_does_not_matter() -> None:
    known, other = (find_groups(with_mlp(kind), ["ffn"])[1] for kind in (Mlp, OtherMlp))
    assert (other.name, other.slices) == (known.name, known.slices)


def test_files_of_earlier_versions_name_hidden_units_by_their_first_layer() -> None:
    model = with_mlp(OtherMlp)
    resize_to_structure(model, {"blocks.1.mlp.fc1.units": [5]})
    assert [len(block.mlp.fc1.weight) for block in model.blocks] == [192, 5]


def test_an_unsupported_module_is_named_and_the_others_are_found() -> None:
    model = with_mlp(SoftMlp)
    assert [group.name for group in find_groups(model, ["ffn"])] == ["blocks.0.mlp"]
    assert left_out(model, "ffn")["blocks.1.mlp"] == (
        "blocks.1.mlp (SoftMlp): softmax runs over it; this module cannot be pruned"
    )
    for block in model.blocks:
        block.mlp.__class__ = SoftMlp
    with pytest.raises(BadInput, match=r"^blocks.0.mlp \(SoftMlp\): softmax runs over it"):
        find_groups(model, ["ffn"])


def test_attention_keeps_timm_class_until_narrower_than_embed_dim() -> None:
    dense, x = make_test_model("twins_pcpvt_small", SMALL["twins_pcpvt_small"])
    (group, *_) = find_groups(dense, ["head"])
    attn = dense.get_submodule(group.owner)
    shrink(dense, [group], {group.name: torch.ones(group.shape, dtype=torch.bool)})
    assert type(attn) is GlobalSubSampleAttn
    shrink(dense, [group], random_odd_masks([group], 0.5))
    assert (type(attn).__name__, attn.num_heads, attn.proj.in_features) == ("GlobalSubSampleAttnOfAnyWidth", 1, 8)
    attn.fused_attn = False
    plain = dense(x)
    attn.fused_attn = True
    torch.testing.assert_close(dense(x), plain, rtol=0, atol=1e-12)


ROTARY = [
    (EvaAttention, {"qkv_bias_separate": True, "gated": True}),
    (EvaAttention, {"qkv_fused": False, "rotate_half": True, "qk_norm": True}),
    (EvaAttention, {"qkv_bias": False}),
    (AttentionRope, {"qkv_fused": False, "gated": True, "rotate_half": True}),
    (AttentionRope, {"qk_norm": True}),
]


class Rotary(nn.Module):
    """An attention with rotary position embedding, applied to the pixels of an image of 24 channels."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.attn, angles = attn, noise(5, 8)
        self.rope = torch.cat((angles.sin(), angles.cos()), dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x.flatten(2).mT, self.rope.to(x.device))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "settings"), ROTARY)
def test_heads_of_rotary_attention(kind: type[nn.Module], settings: dict, fused: bool) -> None:
    attn = randomize_parameters(kind(24, 3, norm_layer=nn.LayerNorm, scale_norm=False, **settings))
    attn.fused_attn = fused
    dense = Rotary(attn)
    (group,) = find_groups(dense, ["head"], torch.zeros(1, 24, 2, 3))
    mask = {"attn.heads": torch.tensor([True, False, True])}
    zeroed, shrunk = zero(copy.deepcopy(dense), [group], mask).attn, shrink(copy.deepcopy(dense), [group], mask).attn
    x, rope = noise(2, 6, 24), dense.rope
    for more in ({}, {"is_causal": True}, {"attn_mask": noise(2, 1, 6, 6) > 0}, {"attn_mask": noise(2, 1, 6, 6)}):
        if more.get("attn_mask") is not None and more["attn_mask"].dtype == torch.bool:
            more["attn_mask"] |= torch.eye(6, dtype=torch.bool)
        torch.testing.assert_close(shrunk(x, rope, **more), zeroed(x, rope, **more), rtol=0, atol=1e-12)
        assert (shrunk(x, rope, **more) - attn(x, rope, **more)).abs().max() > 1e-3
    assert shrunk.proj.in_features == 16


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_a_norm_over_all_heads_couples_them() -> None:
    attn = AttentionRope(24, 3, norm_layer=nn.LayerNorm, scale_norm=True)
    with pytest.raises(
        BadInput, match=r"^attn \(AttentionRope\): attn.norm \(LayerNorm\): a norm over all heads couples"
    ):
        find_groups(Rotary(attn), ["head"], torch.zeros(1, 24, 2, 3))


def test_query_heads_that_share_all_keys_and_values_are_units() -> None:
    attn = AttentionRope(24, 3, norm_layer=nn.LayerNorm, scale_norm=False, qkv_fused=False, num_kv_heads=1)
    dense = Rotary(randomize_parameters(attn))
    (group,) = find_groups(dense, ["head"], torch.zeros(1, 24, 2, 3))
    assert group.shape == (3,)
    mask = {"attn.heads": torch.tensor([True, False, True])}
    zeroed, shrunk = zero(copy.deepcopy(dense), [group], mask).attn, shrink(copy.deepcopy(dense), [group], mask).attn
    x = noise(2, 6, 24)
    torch.testing.assert_close(shrunk(x, dense.rope), zeroed(x, dense.rope), rtol=0, atol=1e-12)
    assert (shrunk(x, dense.rope) - dense.attn(x, dense.rope)).abs().max() > 1e-3
    assert (shrunk.q_proj.out_features, shrunk.k_proj.out_features) == (16, 8)
