"""Groups of each kind per model, merging of heads, rebuilding from a structure, and unsupported modules."""

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import ZOO, batches, images, predict, random_masks, redrawn, tiny
from tests.support.pruned_models import rebuild
from tests.support.reference_kl import literal_vit
from vitprune import BadInput, find_groups, prune, shrink, zero
from vitprune.architectures import merge_heads, structure, uniform_args
from vitprune.config.prune_config import KINDS
from vitprune.pruning.select import select

TWELVE = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 12, "num_classes": 7}
CLOSE = {"rtol": 0, "atol": 1e-12}


def twelve_heads() -> nn.Module:
    return redrawn(timm.create_model("vit_tiny_patch16_224", **TWELVE), 0).double()


def test_groups_of_a_vit_by_hand(vit: nn.Module) -> None:
    result = {kind: find_groups(vit, [kind]) for kind in KINDS}
    assert [(g.name, g.shape) for g in result["ffn"]] == [("blocks.0.mlp", (192,)), ("blocks.1.mlp", (192,))]
    assert [(g.name, g.shape) for g in result["attention"]] == [("blocks.0.attn", (3, 16)), ("blocks.1.attn", (3, 16))]
    assert [(g.name, g.shape) for g in result["head"]] == [("blocks.0.attn.heads", (3,)), ("blocks.1.attn.heads", (3,))]
    assert [(g.name, g.shape) for g in result["residual"]] == [("residual", (48,))]
    assert [(g.name, g.layer_type, g.shape) for g in result["weight"][:4]] == [
        ("blocks.0.attn.qkv.weight", "qkv", (144, 48)),
        ("blocks.0.attn.proj.weight", "proj", (48, 48)),
        ("blocks.0.mlp.fc1.weight", "mlp", (192, 48)),
        ("blocks.0.mlp.fc2.weight", "mlp", (48, 192)),
    ]
    assert len(result["weight"]) == 8


@pytest.mark.parametrize("name", ZOO)
def test_groups_cover_every_parameter(name: str) -> None:
    model = tiny(name)
    kinds = [kind for kind in KINDS if kind not in ("weight", "block", "qk", "vo")]
    reached = {part.param for kind in kinds for g in find_groups(model, [kind]) for part in g.slices}
    assert {n for n, _ in model.named_parameters()} - reached == {
        n for n, _ in model.named_parameters() if n in ("head.bias", "head_dist.bias", "head.fc.bias")
    }


def test_groups_of_a_swin(swin: nn.Module) -> None:
    names = [g.name for g in find_groups(swin, ["ffn"])]
    assert names == [f"layers.{stage}.blocks.{block}.mlp" for stage in range(2) for block in range(2)]
    assert [g.shape for g in find_groups(swin, ["attention"])] == [(3, 8), (3, 8), (6, 8), (6, 8)]
    assert [g.units for g in find_groups(swin, ["head"])] == [3, 3, 6, 6]
    assert [(g.name, g.units) for g in find_groups(swin, ["residual"])] == [
        ("layers.0.residual", 24),
        ("layers.1.residual", 48),
    ]


def test_groups_are_ordered_by_kind(vit: nn.Module) -> None:
    assert [g.kind for g in find_groups(vit, ["residual", "ffn", "attention"])] == [
        "residual",
        *["ffn"] * 2,
        *["attention"] * 2,
    ]
    assert find_groups(vit, []) == []


@pytest.mark.parametrize(
    ("architecture", "args", "kinds", "why"),
    [
        ("mobilenetv3_small_100", {}, ["weight"], None),
        ("mobilenetv3_small_100", {}, ["block"], None),
        ("vgg11", {}, ["block"], r"^VGG: there is no block in it, so it has no groups of kind 'block'"),
        ("mobilenetv3_small_100", {}, ["residual"], None),
        ("mobilenetv3_small_100", {}, ["head"], r"^MobileNetV3: there is no attention with heads in it"),
        (
            "vit_tiny_patch16_224",
            {"qk_norm": True},
            ["attention"],
            r"^blocks.0.attn .*[qk]_norm \(LayerNorm\): a norm over",
        ),
        (
            "vit_tiny_patch16_224",
            {"scale_attn_norm": True},
            ["head"],
            r"^blocks.0.attn .*blocks.0.attn.norm .*couples them",
        ),
        (
            "vit_tiny_patch16_224",
            {"scale_mlp_norm": True},
            ["ffn"],
            r"^blocks.0.mlp .*blocks.0.mlp.norm .*couples its hidden units",
        ),
        ("vit_small_patch16_36x1_224", {"depth": 2}, ["ffn"], None),
        ("vit_small_patch16_18x2_224", {"depth": 2}, ["ffn"], None),
        (
            "pvt_v2_b0",
            {"norm_layer": nn.BatchNorm1d},
            ["residual"],
            r"^PyramidVisionTransformerV2: it does not run on the meta device .running_mean should",
        ),
        ("vit_tiny_patch16_224", {}, ["heads"], r"^kind 'heads': unknown; use some of weight, ffn"),
    ],
)
def test_unsupported_modules_are_named(architecture, args, kinds, why) -> None:
    with torch.device("meta"):
        model = timm.create_model(architecture, **args)
    if why is None:
        assert find_groups(model, kinds)
        return
    with pytest.raises(BadInput, match=why) as refused:
        find_groups(model, kinds)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [2, 5, 8, 11])
def test_merged_heads_sum_over_the_kept_channels(kept: int) -> None:
    model = twelve_heads()
    groups = merge_heads(model, find_groups(model, ["attention"]), 3)
    assert [g.shape for g in groups] == [(3, 32), (3, 32)]
    scores = {g.name: torch.rand(g.shape, generator=torch.Generator().manual_seed(kept)) for g in groups}
    masks = select(scores, 1 - kept / 32, "head")
    x = images(model)
    expected = literal_vit(model, x, masks)
    shrink(model, groups, masks)
    assert [(b.attn.num_heads, b.attn.head_dim, b.attn.attn_dim) for b in model.blocks] == [(3, kept, 3 * kept)] * 2
    torch.testing.assert_close(predict(model, x), expected, **CLOSE)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(predict(model, x), expected, **CLOSE)


def test_merging_heads_differs_from_zeroing() -> None:
    merged, apart = twelve_heads(), twelve_heads()
    groups = merge_heads(merged, find_groups(merged, ["attention"]), 3)
    masks = random_masks(groups, 0.5)
    x = images(merged)
    assert (predict(shrink(merged, groups, masks), x) - predict(zero(apart, groups, masks), x)).abs().max() > 1e-3


def test_deit_base_shrinks_to_the_shapes_of_deit_tiny() -> None:
    with torch.device("meta"):
        base, tiny_stock = timm.create_model("deit_base_patch16_224"), timm.create_model("deit_tiny_patch16_224")
    groups = merge_heads(base, find_groups(base, ["residual", "attention", "ffn"]), 3)
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.shape, generator=generator) for g in groups}
    by_kind = {kind: {g.name: scores[g.name] for g in groups if g.kind == kind} for kind in ("attention", "ffn")}
    masks = select({"residual": scores["residual"]}, 0.75, "layer")
    masks |= select(by_kind["ffn"], 0.75, "layer") | select(by_kind["attention"], 0.75, "head")
    assert masks["blocks.5.attn"].sum(1).tolist() == [64, 64, 64]
    shrink(base, groups, masks)
    assert sum(p.numel() for p in base.parameters()) == 5_717_416
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tiny_stock.state_dict().items()}
    assert {(b.attn.num_heads, b.attn.scale) for b in base.blocks} == {(3, 64**-0.5)}
    assert uniform_args(base) == {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}


def test_heads_that_cannot_be_merged_are_refused(vit: nn.Module, swin: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^blocks.0.attn: 3 heads cannot merge into 2; give a divisor$"):
        merge_heads(vit, find_groups(vit, ["attention"]), 2)
    with pytest.raises(BadInput, match=r"^layers.0.blocks.0.attn .*position table, so heads cannot merge"):
        merge_heads(swin, find_groups(swin, ["attention"])[:1], 1)


def test_merging_does_not_change_other_groups(vit: nn.Module) -> None:
    groups = find_groups(vit, ["ffn", "attention", "weight"])
    assert merge_heads(vit, groups, None) == groups
    assert merge_heads(vit, groups, 3) == groups
    assert [g.shape for g in merge_heads(vit, groups, 1) if g.kind == "attention"] == [(1, 48)] * 2


CUTS = {
    "ffn": (["ffn"], None),
    "attention": (["attention"], None),
    "residual": (["residual"], None),
    "heads": (["head"], None),
    "all": (["residual", "attention", "ffn"], None),
    "merged": (["attention", "ffn"], 1),
    "heads+ffn": (["head", "ffn"], None),
}


@pytest.mark.parametrize(
    ("name", "cut"),
    [(name, cut) for name in ("vit", "odd", "distilled", "extra") for cut in CUTS]
    + [("swin", cut) for cut in CUTS if cut != "merged"]
    + [(name, cut) for name in ("pvt", "pvt-linear") for cut in CUTS],
)
def test_a_cut_model_is_rebuilt_from_its_structure(name: str, cut: str) -> None:
    kinds, merged = CUTS[cut]
    model = tiny(name)
    groups = merge_heads(model, find_groups(model, kinds), merged)
    masks = {}
    for index, group in enumerate(groups):  # another width in every block
        masks |= random_masks([group], min(1 + index, group.shape[-1] - 1))
    shrink(model, groups, masks)
    again = rebuild(tiny(name), {n: list(shape) for n, shape in structure(model).items()})
    assert structure(again) == structure(model)
    again.load_state_dict(model.state_dict(), strict=True)
    x = images(model)
    assert torch.equal(predict(again, x), predict(model, x))


def test_head_and_channels_cut_one_after_the_other_are_rebuilt(vit: nn.Module) -> None:
    for kind, removed in (("head", 1), ("attention", 5)):
        groups = find_groups(vit, [kind])
        shrink(vit, groups, random_masks(groups, removed))
    assert structure(vit)["blocks.0.attn"] == (2, 11)
    again = rebuild(tiny("vit"), structure(vit))
    again.load_state_dict(vit.state_dict(), strict=True)
    x = images(vit)
    assert torch.equal(predict(again, x), predict(vit, x))


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ({"blocks.7.mlp": [4]}, "has no group blocks.7.mlp"),
        ({"blocks.0.mlp": [193]}, r"^blocks.0.mlp: shape \[193\] does not fit into \[192\]"),
        ({"residual": [49]}, r"^residual: shape \[49\] does not fit into \[48\]"),
        ({"blocks.0.attn": [16]}, r"^blocks.0.attn: shape \[16\] does not fit"),
        ({"blocks.0.attn": [4, 13]}, r"^blocks.0.attn: shape \[4, 13\] does not fit"),
        ({"blocks.0.mlp": [0]}, r"^blocks.0.mlp: shape \[0\] does not fit"),
    ],
)
def test_a_structure_of_another_model_is_refused(vit: nn.Module, shapes: dict, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        rebuild(vit, shapes)


def test_uniform_args_are_those_of_timm(vit: nn.Module, swin: nn.Module) -> None:
    assert uniform_args(vit) == {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0}
    assert uniform_args(swin) == {}
    groups = find_groups(vit, ["ffn"])
    shrink(vit, groups, random_masks(groups, 59))
    assert int(48 * uniform_args(vit)["mlp_ratio"]) == 133
    groups = find_groups(vit, ["ffn"])[:1]
    shrink(vit, groups, random_masks(groups, 1))
    assert uniform_args(vit) == {}


def test_heads_are_merged_at_sparsity_zero(vit):
    merged = prune(vit, "upvits-literal", sparsity={"attention": 0.0}, calibration=batches(vit), merge_heads_to=1).model
    assert [(block.attn.num_heads, block.attn.head_dim) for block in merged.blocks] == [(1, 48)] * 2
