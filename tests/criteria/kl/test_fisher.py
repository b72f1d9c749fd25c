"""Fisher scores against autograd on explicit gates, against leave-one-out, and on DeiT-Tiny."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.model_zoo import VIT, batches, images, predict, redrawn, same_state, state, tiny
from tests.support.other_models import PixelNorm, PixelStream
from tests.support.plans import changed, context
from tests.support.reference_kl import assert_fades, fisher_quadratic, gated_vit, kl
from vitprune import BadInput, Group, data, find_groups
from vitprune.architectures import merge_heads
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.kl.exact import kl_divergences
from vitprune.criteria.kl.fisher import fisher_kl, fisher_kl_per_image
from vitprune.criteria.kl.leave_one_out import leave_one_out_kl

ALL = ["residual", "attention", "head", "ffn"]
EVERY_CLASS = context(fisher_directions=1000)


@pytest.mark.parametrize("name", ["vit", "odd"])
def test_with_all_classes_the_score_equals_the_quadratic_form_per_image(name: str) -> None:
    model = tiny(name)
    groups, inputs = find_groups(model, ALL), images(model, 3)
    expected = fisher_quadratic(model, inputs, groups)
    result = fisher_kl_per_image(model, groups, inputs, EVERY_CLASS)
    assert result.keys() == expected.keys()
    for group in groups:
        assert result[group.name].shape == (group.units, 3)
        torch.testing.assert_close(result[group.name], expected[group.name], rtol=1e-9, atol=1e-18)


def test_the_residual_score_equals_the_curvature_of_the_gated_vit(vit: nn.Module) -> None:
    group, inputs, step = find_groups(vit, ["residual"])[0], images(vit, 1), 1e-4
    result = fisher_kl_per_image(vit, [group], inputs, EVERY_CLASS)["residual"][:, 0]
    dense = predict(vit, inputs)
    torch.testing.assert_close(gated_vit(vit, inputs, {}), dense)
    for unit in range(0, 48, 7):
        apart = []
        for by in (-step, step):
            gate = torch.ones(48, dtype=torch.float64)
            gate[unit] += by
            with torch.no_grad():
                apart.append(kl(dense, gated_vit(vit, inputs, {"residual": gate})))
        assert sum(apart) / 2 / step**2 == pytest.approx(float(result[unit]), rel=1e-4)


def test_an_unset_eps_of_a_norm_is_that_of_torch() -> None:
    model = redrawn(timm.create_model("vit_tiny_patch16_224", **VIT, norm_layer=nn.RMSNorm).double().eval(), 2)
    groups, inputs = find_groups(model, ["residual"]), images(model, 2)
    assert model.norm.eps is None
    unset = fisher_kl_per_image(model, groups, inputs, EVERY_CLASS)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 2.0**-52
    torch.testing.assert_close(fisher_kl_per_image(model, groups, inputs, EVERY_CLASS), unset, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["extra", "swin", "pvt"])
def test_residual_scores_equal_the_curvature_of_gated_streams(name: str) -> None:
    model = tiny(name)
    groups, inputs = find_groups(model, ["residual"]), images(model, 2)
    assert_fades(model, inputs, groups, fisher_kl_per_image(model, groups, inputs, EVERY_CLASS))


def test_norms_over_channels_of_pixels_are_scored_along_their_axis_or_refused() -> None:
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = []
    for norm in (timm.layers.LayerNorm2d, PixelNorm, partial(timm.layers.LayerNormAct2d, apply_act=False, eps=1e-6)):
        model = redrawn(PixelStream(norm).double().eval(), 2)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        group = find_groups(model, ["residual"], inputs)
        scores.append(fisher_kl_per_image(model, group, inputs, EVERY_CLASS)[group[0].name])
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-9, atol=1e-18)
    model = redrawn(PixelStream(timm.layers.LayerNormAct2d).double().eval(), 2)
    with pytest.raises(BadInput, match=r"^blocks.0.0: LayerNormAct2d does more than normalize, scale and shift"):
        fisher_kl_per_image(model, find_groups(model, ["residual"], inputs), inputs, EVERY_CLASS)


@torch.no_grad()
def faded(model: nn.Module, group: Group, unit: int, by: float) -> nn.Module:
    """Return a copy with a unit's part of q (attention), v or output scaled by 1 + by: a gate on the weights."""
    model = copy.deepcopy(model)
    for part in group.slices:
        weight = model.get_parameter(part.param)
        if part.axis == 1 and weight.dim() == 2 and part.param.endswith(".weight"):
            weight.view(len(weight), part.outer, group.units, part.inner)[:, :, unit] *= 1 + by
        elif group.kind == "attention" and part.axis == 0:
            weight.view(3, group.units, -1)[0, unit] *= 1 + by
    return model


@pytest.mark.parametrize("kind", ["attention", "head", "ffn"])
@pytest.mark.parametrize("name", ["distilled", "extra", "swin"])
def test_the_score_equals_the_curvature_of_the_kl_in_the_gate(name: str, kind: str) -> None:
    model = tiny(name)
    groups, inputs, step = find_groups(model, [kind]), images(model, 2), 1e-3
    result = fisher_kl_per_image(model, groups, inputs, EVERY_CLASS)
    dense = predict(model, inputs)
    for group in groups[:: len(groups) - 1]:
        for unit in range(0, group.units, max(1, group.units // 3)):
            apart = [kl(dense, predict(faded(model, group, unit, by), inputs)) for by in (-step, step)]
            assert sum(apart) / 2 / step**2 == pytest.approx(float(result[group.name][unit].sum()), rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_the_score_of_small_units_approximates_leave_one_out(kind: str) -> None:
    model = tiny("thin")
    group, data = find_groups(model, [kind])[1], batches(model)
    with torch.no_grad():
        layer = model.blocks[1].mlp.fc2 if kind == "ffn" else model.blocks[1].attn.proj
        layer.weight *= 1e-3
        if kind == "attention":
            model.blocks[1].attn.qkv.weight[: group.units] *= 1e-3
            model.blocks[1].attn.qkv.bias[: group.units] *= 1e-3
    result = fisher_kl(model, [group], data, EVERY_CLASS).scores[group.name]
    expected = leave_one_out_kl(model, [group], data, DEFAULT_CONTEXT).scores[group.name]
    torch.testing.assert_close(result / expected, torch.ones_like(result), rtol=0, atol=5e-3)


def test_a_pair_of_sub_layers_shares_one_gate() -> None:
    model = tiny("extra")  # with LayerScale
    (group,), inputs, step = find_groups(model, ["block"]), images(model, 2), 1e-3
    result = fisher_kl_per_image(model, [group], inputs, EVERY_CLASS)["blocks"].sum(dim=1)
    dense = predict(model, inputs)
    for unit in range(group.num_candidates):
        apart = []
        for by in (-step, step):
            changed = copy.deepcopy(model)
            for body, *_ in group.sublayers[unit : unit + 2]:
                path, _, leaf = body.rpartition(".")
                scale = changed.get_submodule(path).get_submodule("ls1" if leaf == "attn" else "ls2")
                scale.gamma.data *= 1 + by
            apart.append(kl(dense, predict(changed, inputs)))
        assert sum(apart) / 2 / step**2 == pytest.approx(float(result[unit]), rel=2e-3)
    full = fisher_kl(model, [group], batches(model), DEFAULT_CONTEXT).scores["blocks"]
    assert full.isinf().tolist() == [False] * group.num_candidates + [True]


def test_merged_heads_have_the_scores_of_their_channels(vit: nn.Module) -> None:
    groups = find_groups(vit, ["attention"])
    merged = merge_heads(vit, groups, 1)
    one, other = (fisher_kl(vit, each, batches(vit), DEFAULT_CONTEXT).scores for each in (groups, merged))
    assert other["blocks.0.attn"].shape == (1, 48)
    assert all(torch.equal(one[name].flatten(), other[name].flatten()) for name in one)


@pytest.mark.parametrize("head", [None, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()])
def test_directions_average_to_the_fisher_matrix(head: Tensor | None) -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15, 0.0], dtype=torch.float64)
    fisher_matrix = p.diag() - p[:, None] * p
    for number, taken, many in ((6, 6, 1), (5, 5, 4000), (1, 2, 4000)):
        result = list(fisher_directions(p.expand(many, 6), head, number, 5, range(many)))
        assert len(result) == taken
        total = sum(torch.einsum("ia,ib->ab", pull, pull) / many for pull in result)
        torch.testing.assert_close(total, fisher_matrix, rtol=0, atol=1e-15 if many == 1 else 0.01)
    leading = list(fisher_directions(p[None], head, 4, 0, [0]))[:2]
    weight = torch.eye(6, dtype=torch.float64) if head is None else head
    seen = torch.cat(leading) @ weight  # the best rank-two approximation at the head's input
    best = torch.linalg.eigvalsh(weight.T @ fisher_matrix @ weight)[-2:].sum()
    assert float(seen.square().sum()) == pytest.approx(float(best), rel=1e-2)


def test_outputs_of_different_tokens_are_uncorrelated() -> None:
    p = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    total = torch.zeros(12, 12, dtype=torch.float64)
    for seed in range(2000):
        for pull in fisher_directions(p, None, 4, seed, [0]):
            total += pull.flatten()[:, None] * pull.flatten() / 2000
    expected = torch.block_diag(*[row.diag() - row[:, None] * row for row in p[0]])
    torch.testing.assert_close(total, expected, rtol=0, atol=0.02)


def test_random_signs_are_unbiased(vit: nn.Module) -> None:
    groups, inputs = find_groups(vit, ALL), images(vit, 2)
    exact = torch.cat(list(fisher_kl_per_image(vit, groups, inputs, EVERY_CLASS).values()))
    settings = [context(fisher_directions=2, seed=seed) for seed in range(60)]
    draws = torch.stack([torch.cat(list(fisher_kl_per_image(vit, groups, inputs, s).values())) for s in settings])
    spread = draws.std(dim=0) / len(draws) ** 0.5
    off = (draws.mean(dim=0) - exact).abs() / spread
    assert 0.1 < float(off.mean()) < 2  # means of draws are off by about one standard error
    assert float(off.max()) < 4


def test_random_signs_depend_on_the_image_position_not_the_batch(vit: nn.Module) -> None:
    groups, inputs = find_groups(vit, ALL), images(vit, 6)
    few = context(fisher_directions=2, seed=3)
    full = fisher_kl_per_image(vit, groups, inputs, few)
    labels = torch.zeros(6, dtype=torch.int64)
    total = fisher_kl(vit, groups, [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])], few).scores
    rest = fisher_kl(vit, groups, [(inputs[4:], labels[4:])], changed(few, first=4)).scores
    tight = fisher_kl_per_image(vit, groups, inputs, changed(few, memory=1))  # one image at a time
    for group in groups:
        torch.testing.assert_close(total[group.name].flatten(), full[group.name].sum(dim=1), rtol=1e-12, atol=1e-18)
        torch.testing.assert_close(rest[group.name].flatten(), full[group.name][:, 4:].sum(1), rtol=1e-12, atol=1e-18)
        torch.testing.assert_close(tight[group.name], full[group.name], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("requires", [True, False])
def test_a_frozen_model_has_the_same_scores_and_remains_frozen(vit: nn.Module, requires: bool) -> None:
    groups, before = find_groups(vit, ALL), state(vit)
    expected = fisher_kl(vit, groups, batches(vit), DEFAULT_CONTEXT).scores
    vit.requires_grad_(requires).train()
    vit.blocks[0].eval()
    with torch.no_grad():
        result = fisher_kl(vit, groups, batches(vit), DEFAULT_CONTEXT).scores
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert all(p.requires_grad is requires and p.grad is None for p in vit.parameters())
    assert vit.training
    assert not vit.blocks[0].training
    assert vit.blocks[1].attn.training
    assert same_state(vit, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())


def test_groups_without_gates_are_refused_by_name(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^blocks.0.attn.qkv.weight: Fisher scores are for units, not"):
        fisher_kl(vit, find_groups(vit, ["weight"]), batches(vit), DEFAULT_CONTEXT)
    with pytest.raises(BadInput, match=r"^kl-fisher: needs images; give calibration batches$"):
        fisher_kl(vit, find_groups(vit, ["ffn"]), [], DEFAULT_CONTEXT)
    groups = find_groups(vit, ["ffn"])
    vit.blocks[1].mlp = nn.Identity()
    unused = nn.Module()
    unused.fc2 = nn.Linear(192, 48)
    vit.add_module("spare", unused)
    moved = replace(groups[0], slices=tuple(replace(p, param="spare.fc2.weight") for p in groups[0].slices[-1:]))
    with pytest.raises(BadInput, match=r"^spare.fc2: no gradient reaches it, so its units have no gate gradient"):
        fisher_kl(vit, [moved], batches(vit), DEFAULT_CONTEXT)


@pytest.mark.real
def test_ranks_on_deit_tiny_match_leave_one_out(real_deit: nn.Module, real_inputs: Tensor) -> None:
    for kind, path, least in (
        ("ffn", "blocks.10.mlp", 0.9),
        ("attention", "blocks.9.attn", 0.9),
        ("residual", "residual", 0.3),  # its removal is a large change
    ):
        group = next(group for group in find_groups(real_deit, [kind]) if group.name == path)
        result = fisher_kl_per_image(real_deit, [group], real_inputs, DEFAULT_CONTEXT)[path].sum(dim=1)
        some = torch.arange(0, group.units, group.units // 24)
        expected = kl_divergences(real_deit, [group], {path: some}, real_inputs, DEFAULT_CONTEXT)[path].sum(dim=1)
        assert spearman(result[some], expected) > least


@pytest.fixture(scope="session")
def real_inputs(real_deit: nn.Module, real_data: Path) -> Tensor:
    """Three real images as the model reads them."""
    source = data.open_source(f"parquet:{real_data / 'imagenet-val-800.parquet'}")
    transform = data.transform(data.data_config(real_deit))
    return torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in source.ids[:3]])


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_memory_of_a_forward_pass_is_released(vit: nn.Module) -> None:
    seen: list[weakref.ref[Tensor]] = []
    groups = find_groups(vit, ["ffn", "attention", "residual"])  # before the hook: it runs forward passes of its own
    vit.get_submodule("head").register_forward_hook(lambda module, given, output: seen.append(weakref.ref(output)))
    fisher_kl(vit, groups, batches(vit), DEFAULT_CONTEXT)
    gc.collect()
    assert len(seen) == 4
    assert all(ref() is None for ref in seen)
