"""Hierarchical models, PVTv2 and Swin: one residual stream per stage, and the layers between stages."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models.pvt_v2 import Attention
from torch import nn

from tests.support.model_zoo import ZOO, images, predict, random_masks, redrawn, same_state, state, tiny
from tests.support.plans import context
from tests.support.reference_kl import LiveNorm, kl
from vitprune import BadInput, find_groups, prune, shrink, zero
from vitprune.architectures import merge_heads, structure, uniform_args
from vitprune.architectures.inferred_widths import inferring_classes, original_class
from vitprune.config.params import load_params
from vitprune.criteria.kl.fisher import fisher_kl_per_image
from vitprune.evaluation.cost import count

CLOSE = {"rtol": 0, "atol": 1e-12}
KINDS = ["residual", "attention", "ffn"]


@pytest.fixture
def pvt() -> nn.Module:
    return tiny("pvt")


def stream_of(norm: str) -> tuple[str, int]:
    """Return the group whose channels a norm normalizes, and how often they are concatenated in it."""
    if norm == "norm":
        return "layers.1.residual", 1
    if norm == "layers.1.downsample.norm":  # four concatenated neighbours of the previous stage
        return "layers.0.residual", 4
    if norm == "patch_embed.norm":
        return "0.residual", 1
    if norm.endswith(".attn.norm"):
        return norm.removesuffix(".norm") + ".sr", 1
    return ".".join(norm.split(".")[:2]) + ".residual", 1


def use_kept_channels(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Let every norm of a model use only the channels that masks keep."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            group, side_by_side = stream_of(path)
            live = next(mask for key, mask in masks.items() if key.endswith(group))
            model.set_submodule(path, LiveNorm(module, live.repeat(side_by_side)))


@pytest.mark.parametrize("name", ["pvt", "pvt-linear", "swin"])
@pytest.mark.parametrize("removed", [1, 0.3])
def test_each_norm_uses_only_its_kept_residual_channels(name: str, removed: float) -> None:
    masked, shrunk = tiny(name), tiny(name)
    groups = find_groups(shrunk, ["residual"])
    masks = random_masks(groups, removed)
    x = images(masked)
    dense = predict(masked, x)
    use_kept_channels(masked, masks)
    shrink(shrunk, groups, masks)
    torch.testing.assert_close(predict(shrunk, x), predict(masked, x), **CLOSE)
    assert (predict(shrunk, x) - dense).abs().max() > 1e-3
    kept = [int(mask.sum()) for key, mask in masks.items() if key.endswith(".residual")]
    assert shrunk.num_features == shrunk.head_hidden_size == kept[-1]
    assert getattr(shrunk, "embed_dim", kept[0]) == kept[0]  # PVTv2 has none
    assert [feature["num_chs"] for feature in shrunk.feature_info] == kept


def test_a_swin_whose_classifier_reads_two_pools_side_by_side() -> None:
    args = ZOO["swin"][1] | {"global_pool": "catavgmax"}
    model = redrawn(timm.create_model("swin_tiny_patch4_window7_224", **args), 0).double()
    groups, x = find_groups(model, ["residual"]), images(model)
    shrink(model, groups, random_masks(groups, 16))
    assert (model.num_features, model.head_hidden_size, model.head.in_features) == (32, 64, 32)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (3, 64)
    model.reset_classifier(5)
    assert predict(model, x).shape == (3, 5)


def test_groups_of_a_pvt_by_hand(pvt: nn.Module) -> None:
    result = {kind: [(g.name, g.shape) for g in find_groups(pvt, [kind])] for kind in (*KINDS, "head")}
    assert result["residual"] == [
        ("stages.0.residual", (16,)),
        ("stages.1.residual", (24,)),
        ("stages.2.residual", (40,)),
        ("stages.0.blocks.0.attn.sr", (16,)),
        ("stages.0.blocks.1.attn.sr", (16,)),
        ("stages.1.blocks.0.attn.sr", (24,)),  # the last stage does not reduce its map
    ]
    paths = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.2.blocks.0"]
    assert result["attention"] == [
        (f"{p}.attn", shape) for p, shape in zip(paths, [(2, 8), (2, 8), (3, 8), (4, 10)], strict=True)
    ]
    assert result["ffn"] == [(f"{p}.mlp", (n,)) for p, n in zip(paths, (32, 32, 36, 80), strict=True)]
    assert result["head"] == [(f"{p}.attn.heads", (n,)) for p, n in zip(paths, (2, 2, 3, 4), strict=True)]
    weights = [(g.name, g.layer_type) for g in find_groups(pvt, ["weight"])[:5]]
    layers = {"attn.q": "qkv", "attn.kv": "qkv", "attn.proj": "proj", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}
    assert weights == [(f"stages.0.blocks.0.{layer}.weight", pool) for layer, pool in layers.items()]


@pytest.mark.parametrize("name", ["pvt", "pvt-linear", "swin"])
def test_kinds_shrunk_together_equal_kinds_shrunk_in_turn(name: str) -> None:
    together, in_turn = tiny(name), tiny(name)
    groups = find_groups(together, KINDS)
    masks = random_masks(groups, 0.3)
    shrink(together, groups, masks)
    for kind in reversed(KINDS):
        shrink(in_turn, find_groups(in_turn, [kind]), masks)
    assert same_state(in_turn, state(together))
    x = images(together)
    assert torch.equal(predict(in_turn, x), predict(together, x))
    plain = predict(unfused(together), x)
    torch.testing.assert_close(plain, predict(in_turn, x), **CLOSE)


def unfused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if "fused_attn" in vars(module):
            module.fused_attn = False
    return model


def test_attention_has_timm_class_if_all_widths_agree(pvt: nn.Module) -> None:
    def changed() -> list[bool]:
        kinds = [type(block.attn) for stage in pvt.stages for block in stage.blocks]
        assert {original_class(kind) for kind in kinds} == {Attention}
        return [kind is not Attention for kind in kinds]

    assert changed() == [False] * 4
    for kind, expected in (("residual", True), ("attention", False)):
        groups = find_groups(pvt, [kind])
        shrink(pvt, groups, random_masks(groups, 0.5))
        assert changed() == [expected] * 4
    assert uniform_args(pvt)["embed_dims"] == [8, 12, 20]
    sr = find_groups(pvt, ["residual"])[3:4]
    assert [g.name for g in sr] == ["stages.0.blocks.0.attn.sr"]
    shrink(pvt, sr, random_masks(sr, 1))
    assert changed() == [True, *[False] * 3]
    assert uniform_args(pvt) == {}


@pytest.mark.parametrize("name", ["pvt", "pvt-linear"])
def test_inferring_attention_equals_timm_at_full_width(name: str) -> None:
    for on in (True, False):
        expected = tiny(name) if on else unfused(tiny(name))
        other = tiny(name) if on else unfused(tiny(name))
        (classes, x) = (
            inferring_classes(other, {16, 24, 40}, lambda other=other: predict(other, images(other))),
            images(other),
        )
        assert len(classes) >= 4
        for path, kind in classes:
            other.get_submodule(path).__class__ = kind
        torch.testing.assert_close(predict(other, x), predict(expected, x), **CLOSE)


def test_heads_of_a_pvt_are_merged(pvt: nn.Module) -> None:
    x, groups = images(pvt), merge_heads(pvt, find_groups(pvt, ["attention"]), 1)
    assert [g.shape for g in groups] == [(1, 16), (1, 16), (1, 24), (1, 40)]
    one = groups[:1]
    shrink(pvt, one, {one[0].name: torch.ones(1, 16, dtype=torch.bool)})
    attn = pvt.stages[0].blocks[0].attn
    assert (attn.num_heads, attn.head_dim, type(attn)) == (1, 16, Attention)
    y, size = torch.randn(2, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), (8, 8)
    before = tiny("pvt").stages[0].blocks[0].attn
    reduced = before.norm(before.sr(y.transpose(1, 2).reshape(2, 16, 8, 8)).flatten(2).transpose(1, 2))
    q, (k, v) = before.q(y), before.kv(reduced).chunk(2, dim=-1)
    expected = before.proj(
        (q @ k.transpose(1, 2) * before.scale).softmax(-1) @ v
    )  # the scale of the original heads, one softmax
    torch.testing.assert_close(attn(y, size), expected, **CLOSE)
    assert predict(pvt, x).shape == (3, 7)


def test_the_recipe_shrinks_b1_to_the_shapes_of_b0() -> None:
    recipe = load_params(Path(__file__).parents[2] / "recipes/up_pvt_v2_b0.yaml")
    with torch.device("meta"):
        dense, stock = timm.create_model(recipe.model.name), timm.create_model("pvt_v2_b0")
    assert recipe.prune.kinds == KINDS
    assert isinstance(recipe.prune.sparsity, float)
    groups = find_groups(dense, KINDS)
    shrink(dense, groups, random_masks(groups, recipe.prune.sparsity))
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in stock.parameters()) == 3_666_760
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    assert {(b.attn.scale, type(b.attn)) for stage in dense.stages for b in stage.blocks} == {(32**-0.5, Attention)}
    assert uniform_args(dense) == {
        "embed_dims": [32, 64, 160, 256],
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 2, 5, 8],
        "mlp_ratios": [8.0, 8.0, 4.0, 4.0],
        "sr_ratios": [8, 4, 2, 1],
    }


def test_a_halved_pvt_equals_a_timm_model_of_its_shapes(pvt: nn.Module) -> None:
    half = prune(pvt, "channel-magnitude", sparsity=dict.fromkeys(KINDS, 0.5), example_input=images(pvt)).model
    args = uniform_args(half)
    stock = timm.create_model("pvt_v2_b0", num_classes=7, **args).double()
    stock.load_state_dict(half.state_dict(), strict=True)
    assert count(half, images(pvt)) == count(stock.eval(), images(pvt))
    torch.testing.assert_close(predict(stock, images(pvt)), predict(half, images(pvt)), **CLOSE)


def test_recorded_convolution_sizes_are_updated_and_gradients_flow(pvt: nn.Module) -> None:
    groups = find_groups(pvt, KINDS)
    shrink(pvt, groups, random_masks(groups, 0.25))
    for module in pvt.modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert shape == tuple(module.weight.shape[:2])
    pvt(images(pvt)).sum().backward()
    assert all(p.grad is not None for p in pvt.parameters())


def test_a_hidden_unit_includes_its_depthwise_channel(pvt: nn.Module) -> None:
    group = find_groups(pvt, ["ffn"])[0]
    before = state(pvt)
    zero(pvt, [group], {group.name: torch.arange(32) != 5})
    changed = {name: tensor for name, tensor in pvt.state_dict().items() if not torch.equal(tensor, before[name])}
    inside = "stages.0.blocks.0.mlp"
    ends = ("fc1.weight", "fc1.bias", "dwconv.weight", "dwconv.bias", "fc2.weight")
    assert set(changed) == {f"{inside}.{end}" for end in ends}
    assert all(not changed[f"{inside}.{end}"][5].any() for end in ends[:-1])
    assert not changed[f"{inside}.fc2.weight"][:, 5].any()


@pytest.mark.parametrize("name", ["pvt", "swin"])
def test_zeroing_residual_channels_is_refused(name: str) -> None:
    model = tiny(name)
    groups = find_groups(model, ["residual"])
    with pytest.raises(BadInput, match="residual channels cannot be zeroed"):
        zero(model, groups, random_masks(groups, 1))


def test_the_structure_of_a_pvt_names_its_streams_and_reductions(pvt: nn.Module) -> None:
    assert list(structure(pvt)) == sorted(g.name for g in find_groups(pvt, KINDS))


@pytest.mark.parametrize(
    ("path", "kind", "why"),
    [
        ("stages.0.blocks.1", "residual", r"^PyramidVisionTransformerV2: it does not run .*Sequential.forward"),
        (
            "stages.0.blocks.1.mlp",
            "ffn",
            r"^PyramidVisionTransformerV2: it does not run .*Sequential.forward\(\) takes",
        ),
        (
            "stages.0.norm",
            "residual",
            r"^patch_embed.proj: the residual .*stages.0.norm .Softmax.: softmax runs over it",
        ),
        ("stages.1.downsample.proj", "residual", r"^PyramidVisionTransformerV2: it does not run on images of 3 x "),
    ],
)
def test_unsupported_modules_of_a_pvt_are_named(pvt: nn.Module, path: str, kind: str, why: str) -> None:
    pvt.set_submodule(path, nn.Softmax(dim=-1) if path == "stages.0.norm" else nn.Sequential())
    with pytest.raises(BadInput, match=why):
        find_groups(pvt, [kind])


class OwnAttention(Attention):
    """An attention of a user's own class."""


def test_a_pvt_with_an_attention_of_another_class() -> None:
    masked, shrunk, x = pvt_of_own_attentions(), pvt_of_own_attentions(), images(tiny("pvt"))
    groups = find_groups(shrunk, ["residual"])
    assert [group.name for group in groups] == [group.name for group in find_groups(tiny("pvt"), ["residual"])]
    masks = random_masks(groups, 0.3)
    use_kept_channels(masked, masks)
    shrink(shrunk, groups, masks)
    torch.testing.assert_close(predict(shrunk, x), predict(masked, x), **CLOSE)
    with pytest.raises(BadInput, match=r"^stages.0.blocks.0.attn .OwnAttention.: its class is not timm's"):
        find_groups(pvt_of_own_attentions(), ["weight"])


def pvt_of_own_attentions() -> nn.Module:
    model = tiny("pvt")
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.__class__ = OwnAttention
    return model


class GatedNorm(nn.Module):
    """A LayerNorm whose statistics weight channel c by `gate[c]`; its output is multiplied by the gate."""

    def __init__(self, norm: nn.LayerNorm, gate: torch.Tensor, readers: bool):
        super().__init__()
        self.norm, self.gate, self.readers = norm, gate, readers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = (self.gate * x).sum(-1, keepdim=True) / self.gate.sum()
        variance = (self.gate * (x - mean) ** 2).sum(-1, keepdim=True) / self.gate.sum()
        y = (x - mean) / (variance + self.norm.eps).sqrt() * self.norm.weight + self.norm.bias
        return self.gate * y if self.readers else y


def gated(name: str, group: str, unit: int, by: float) -> nn.Module:
    model = tiny(name)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            stream, side_by_side = stream_of(path)
            gate = torch.ones(len(module.weight) // side_by_side, dtype=torch.float64)
            if group.endswith(stream):
                gate[unit] += by
            enters = path == "patch_embed.norm" or (name == "pvt" and path.endswith("downsample.norm"))
            model.set_submodule(path, GatedNorm(module, gate.repeat(side_by_side), readers=not enters))
    return model


@pytest.mark.parametrize("name", ["pvt", "swin"])
def test_fisher_is_the_curvature_of_the_divergence_under_a_residual_gate(name: str) -> None:
    model, step = tiny(name), 1e-3
    groups, x = find_groups(model, ["residual"]), images(tiny(name), 2)
    result = fisher_kl_per_image(model, groups, x, context(fisher_directions=1000))
    dense = predict(model, x)
    for group in groups:
        for unit in (0, group.units // 2):
            apart = [kl(dense, predict(gated(name, group.name, unit, by), x)) for by in (-step, step)]
            assert sum(apart) / 2 / step**2 == pytest.approx(float(result[group.name][unit].sum()), rel=5e-3)
