"""Every kind of group of every model that we claim, proven as `vitprune check` proves it; and proofs that fail."""

import copy
import sys
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import GatedMlp, GluMlp, Mlp, SwiGLU
from timm.models.levit import LevitMlp
from timm.models.twins import GlobalSubSampleAttn
from tiny_models import ZOO, batches
from torch import nn

from vitprune import BadInput, cli, find_groups, prune, shrink, zero
from vitprune.check import check, odd_masks, redrawn, subject
from vitprune.evaluate import macs
from vitprune.families import rules
from vitprune.groups import KINDS
from vitprune.proof import promise, prove

SMALL = {
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (3, 6),
    },
    "xcit_nano_12_p16_224": {"depth": 2, "embed_dim": 48},
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4},
    "levit_128s": {"img_size": 64, "embed_dim": (48, 64, 80), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)},
    "levit_conv_128s": {
        "img_size": 64,
        "embed_dim": (48, 64, 80),
        "key_dim": 8,
        "num_heads": (2, 3, 4),
        "depth": (1, 1, 1),
    },
    "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40)},
    "convit_tiny": {"img_size": 64, "depth": 3, "embed_dim": 12, "local_up_to_layer": 2},
    "coat_tiny": {
        "img_size": 64,
        "embed_dims": (32, 48, 48, 48),
        "serial_depths": (1, 1, 1, 1),
        "parallel_depth": 1,
    },
    "twins_pcpvt_small": {"embed_dims": (16, 24, 32, 48), "num_heads": (2, 3, 4, 6), "depths": (1, 1, 1, 1)},
    "twins_svt_small": {"embed_dims": (16, 24, 32, 48), "num_heads": (2, 3, 4, 6), "depths": (2, 1, 1, 1)},
    "maxvit_pico_rw_256": {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 24)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1)},
    "seresnet50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 24)},
}
SMALL["vit_base_patch16_siglip_224"] = ZOO["vit"][1]
PROVEN = {
    "vit_base_patch16_siglip_224": "ffn head attention block",
    "beit_base_patch16_224": "ffn head attention weight residual",
    "swinv2_tiny_window8_256": "ffn head attention weight residual",
    "xcit_nano_12_p16_224": "ffn head weight residual",
    "cait_xxs24_224": "ffn head attention weight residual",
    "levit_128s": "ffn head weight residual",
    "levit_conv_128s": "ffn head residual",
    "pit_ti_224": "ffn head attention residual",
    "tiny_vit_5m_224": "ffn head attention residual",
    "efficientformer_l1": "ffn head residual",
    "convit_tiny": "ffn head attention weight residual",
    "coat_tiny": "ffn weight",
    "mvitv2_tiny": "head residual",
    "twins_pcpvt_small": "ffn head attention weight residual",
    "twins_svt_small": "ffn head attention residual",
    "mobilevit_xxs": "ffn head attention residual",
    "mobilevitv2_050": "ffn residual",
    "maxvit_pico_rw_256": "ffn head attention residual",
    "maxvit_rmlp_pico_rw_256": "head residual",
    "poolformer_s12": "ffn residual",
    "efficientvit_b0": "ffn head residual",
    "convnext_atto": "ffn residual",
    "resnet50": "ffn residual",
    "seresnet50": "ffn residual",
    "test_efficientnet": "ffn",
    "efficientvit_m0": "ffn weight",  # whose MLPs nobody named
}
REFUSED = [
    ("xcit_nano_12_p16_224", "attention", r"^blocks.0.attn \(XCA\): attention among channels"),
    ("levit_128s", "attention", r"^stages.0.blocks.0.attn \(Attention\): its keys and values differ in width"),
    (
        "efficientformer_l1",
        "attention",
        r"^stages.3.blocks.2.token_mixer \(Attention\): its keys and values differ in width",
    ),
    ("efficientvit_b0", "attention", r"^stages.2.blocks.1.context_module.main \(LiteMLA\): its aggregation mixes"),
    ("mvitv2_tiny", "attention", r"^stages.0.blocks.0.attn \(MultiScaleAttention\): pooling shares its weights"),
    ("coat_tiny", "head", r"^crpe1 \(ConvRelPosEnc\): the blocks of a stage share it"),
    ("mobilevitv2_050", "head", r"^stages.2.1.transformer.0.attn \(LinearSelfAttention\): it has no heads"),
    ("poolformer_s12", "head", "^MetaFormer: there is no attention in it"),
    (
        "convnextv2_atto",
        "ffn",
        r"^stages.0.blocks.0.mlp.grn \(GlobalResponseNorm\): a norm .* couples its hidden units",
    ),
    ("resnext50_32x4d", "ffn", r"^layer1.0.conv2 \(Conv2d\): what it does to hidden units"),
    ("mixer_s32_224", "head", "^MlpMixer: there is no attention in it"),
    ("volo_d1_224", "head", r"^network.0.0.attn \(OutlookAttention\): this attention is not understood yet"),
    ("visformer_tiny", "ffn", r"^stage1.0.mlp \(SpatialMlp\): this MLP is not understood yet"),
    ("gmlp_s16_224", "ffn", r"^blocks.0.mlp_channels.gate.norm|^blocks.0.mlp_channels.gate "),
    ("coat_tiny", "residual", "^CoaT: with a narrower residual stream it does not run "),
    ("cait_xxs24_224", "block", "^Cait: groups of kind 'block' are not understood yet"),
]

VIT = ("vit_tiny_patch16_224", ZOO["vit"][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "extra", "distilled", "swin", "pvt", "pvt-linear"])
def test_families_of_old_are_proven(name: str, kind: str) -> None:
    architecture, args = ZOO[name]
    rows = list(check(architecture, [kind], [0.5], args))
    if kind == "block" and name.startswith(("swin", "pvt")):
        assert [row.verdict for row in rows] == ["refused"]
    else:
        assert [(row.verdict, row.why) for row in rows] == [("proven", "")]
        assert rows[0].proof.params_after <= rows[0].proof.params_before


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in PROVEN for kind in PROVEN[name].split()])
def test_models_of_known_parts_are_proven(name: str, kind: str) -> None:
    rows = list(check(name, [kind], [0.5], SMALL.get(name, {}) | {"num_classes": 7}))
    assert [(row.verdict, row.why) for row in rows] == [("proven", "")]
    assert kind == "weight" or rows[0].proof.params_after < rows[0].proof.params_before


@pytest.mark.parametrize(("name", "kind", "why"), REFUSED)
def test_what_a_model_cannot_lose_is_refused_by_name(name: str, kind: str, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **SMALL.get(name, {}))
    with pytest.raises(BadInput, match=why):
        find_groups(model, [kind])


class Host(nn.Module):
    """A part on its own, between two layers."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.before, self.part, self.after = nn.Linear(6, 12), part, nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.part(self.before(x)))


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
def test_hidden_units_of_a_part_by_itself(part: nn.Module, units: int, slices: int, buffers: int) -> None:
    model = redrawn(Host(part))
    (group,) = rules.groups(model, "ffn")
    assert (group.name, group.shape, len(group.slices), len(group.buffers)) == ("part", (units,), slices, buffers)
    masks = odd_masks([group], 0.4)
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeroed, shrunk = zero(copy.deepcopy(model), [group], masks), shrink(copy.deepcopy(model), [group], masks)
    torch.testing.assert_close(shrunk(x), zeroed(x), rtol=0, atol=1e-12)
    assert (zeroed(x) - model(x)).abs().max() > 1e-3
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in shrunk.parameters())
    assert gone == sum(promise(model, [group], masks).values()) > 0


def test_a_unit_behind_a_batch_norm_goes_with_its_statistics() -> None:
    model = redrawn(Host(LevitMlp(12, 16)))
    (group,) = rules.groups(model, "ffn")
    masks = {"part": torch.arange(16) != 3}
    mean = model.part.ln1.bn.running_mean.clone()
    zero(model, [group], masks)
    assert torch.equal(model.part.ln1.bn.running_mean, mean)
    assert not model.part.ln1(model.before(torch.randn(2, 9, 6, dtype=torch.float64)))[..., 3].any()
    shrink(model, [group], masks)
    norm = model.part.ln1.bn
    assert torch.equal(norm.running_mean, mean[torch.arange(16) != 3])
    assert (norm.num_features, len(norm.running_var), isinstance(norm.running_var, nn.Parameter)) == (15, 15, False)
    with pytest.raises(BadInput, match=r"^part.ln1.linear.weight: axis 0 is 15 long, the group is out of date"):
        zero(model, [group], masks)


class OtherMlp(Mlp):
    """Of another class, and nothing else."""


class SoftMlp(Mlp):
    """Its hidden units compete."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).softmax(dim=-1))


def with_mlp(kind: type[Mlp]) -> nn.Module:
    model = timm.create_model("beit_base_patch16_224", **SMALL["beit_base_patch16_224"])
    model.blocks[1].mlp.__class__ = kind
    return model


def test_an_mlp_of_another_class_is_found_by_how_it_runs() -> None:
    known, other = (find_groups(with_mlp(kind), ["ffn"])[1] for kind in (Mlp, OtherMlp))
    assert other.name == "blocks.1.mlp.fc1.units"
    assert set(other.slices) == set(known.slices)


def test_the_first_module_that_is_not_understood_is_named_and_others_do_not_matter() -> None:
    model = with_mlp(SoftMlp)
    assert len(find_groups(model, ["head"])) == 2
    with pytest.raises(BadInput, match=r"^blocks.1.mlp \(SoftMlp\): this MLP is not understood yet"):
        find_groups(model, ["ffn"])


def test_attentions_are_timms_until_they_are_narrower_than_their_stream() -> None:
    dense, x = subject("twins_pcpvt_small", SMALL["twins_pcpvt_small"])
    (group, *_) = find_groups(dense, ["head"])
    attn = dense.get_submodule(group.owner)
    shrink(dense, [group], {group.name: torch.ones(group.shape, dtype=torch.bool)})
    assert type(attn) is GlobalSubSampleAttn
    shrink(dense, [group], odd_masks([group], 0.5))
    assert (type(attn).__name__, attn.num_heads, attn.proj.in_features) == ("CutSubSampled", 1, 8)
    attn.fused_attn = False
    plain = dense(x)
    attn.fused_attn = True
    torch.testing.assert_close(dense(x), plain, rtol=0, atol=1e-12)


def broken(kind: str, change) -> str:
    dense, inputs = subject(*VIT)
    groups = find_groups(dense, [kind])
    masks = odd_masks(groups, 0.5)
    assert prove(dense, groups, masks, inputs).faults == ()
    return "; ".join(prove(dense, [change(group) for group in groups], masks, inputs).faults)


@pytest.mark.parametrize("gone", range(3))
def test_a_group_without_one_of_its_slices_fails(gone: int) -> None:
    def without(group):
        return replace(group, slices=group.slices[:gone] + group.slices[gone + 1 :])

    assert "RuntimeError: " in broken("ffn", without)


def test_a_slice_of_other_units_fails() -> None:
    def reversed_heads(group):
        rows, *others = group.slices
        return replace(group, slices=(replace(rows, outer=1, inner=3 * rows.inner), *others))

    assert "its logits differ by" in broken("head", reversed_heads)


def test_a_cut_that_nobody_records_fails() -> None:
    def unrecorded(group):
        return replace(group, name=f"{group.name}.other")

    dense, inputs = subject(*VIT)
    groups = [unrecorded(group) for group in find_groups(dense, ["attention"])]
    scaled = [replace(group, resize=lambda attn, shape: None) for group in groups]
    assert prove(dense, scaled, odd_masks(scaled, 0.5), inputs).faults


def test_removing_what_does_nothing_proves_nothing() -> None:
    dense, inputs = subject(*VIT)
    groups = find_groups(dense, ["ffn"])
    with torch.no_grad():
        for block in dense.blocks:
            block.mlp.fc2.weight.zero_()
    assert prove(dense, groups, odd_masks(groups, 0.5), inputs).faults == (
        "removing its units changes nothing, so nothing is proven",
    )


def test_masks_leave_an_odd_number_of_units_and_never_none() -> None:
    dense, _ = subject(*VIT)
    for kind in ("ffn", "attention", "head", "residual"):
        groups = find_groups(dense, [kind])
        for ratio in (0.01, 0.5, 0.99):
            masks = odd_masks(groups, ratio)
            assert all(bool((masks[group.name].sum(-1) % 2 == 1).all()) for group in groups)


def test_the_command_prints_proofs_and_ends_with_1_where_one_fails(monkeypatch, capsys) -> None:
    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vitprune", "check", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    code, told = run("test_vit", "--kinds", "ffn,head", "--ratios", "0.5")
    assert (code, told.count("proven")) == (0, 2)
    right = prove
    monkeypatch.setattr(
        "vitprune.check.prove",
        lambda dense, groups, *rest: right(dense, [replace(g, slices=g.slices[:2]) for g in groups], *rest),
    )
    code, told = run("test_vit", "--kinds", "ffn", "--ratios", "0.5")
    assert (code, told.count("failed")) == (1, 1)
    assert run("test_vit", "--ratios", "half")[0] == 2


@pytest.mark.parametrize(
    ("kinds", "ratios", "why"),
    [(["fnn"], [0.5], "^--kinds 'fnn': unknown"), (["ffn"], [1.0], "^--ratios 1.0: must be above 0 and below 1")],
)
def test_what_cannot_be_proven_is_refused(kinds, ratios, why) -> None:
    with pytest.raises(BadInput, match=why):
        list(check(*VIT[:1], kinds, ratios))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256", "cait_xxs24_224"])
def test_channels_that_have_no_basis_of_their_own_are_not_rebased(name: str) -> None:
    model = timm.create_model(name, num_classes=7, **SMALL[name])
    with pytest.raises(BadInput, match=r"its q, k and v do not come from one Linear layer; use heads or ffn here$"):
        prune(model, "unit-obs", {"attention": 0.5}, batches(model))


def test_a_model_without_a_classifier_is_proven_with_one() -> None:
    dense, _ = subject("vit_small_patch14_dinov2", {"depth": 1, "embed_dim": 48, "num_heads": 3})
    assert dense.num_classes == 10


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256", "vit_base_patch16_siglip_224"])
def test_macs_are_counted_where_weights_are_used(name: str) -> None:
    dense, inputs = subject(name, SMALL[name])
    total, layers = macs(dense, inputs[:1])
    assert [
        group.name for group in find_groups(dense, ["weight"]) if not layers.get(group.name[: -len(".weight")])
    ] == []
    assert 0 < sum(layers.values()) < total
