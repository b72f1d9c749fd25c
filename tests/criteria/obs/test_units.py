"""Structured OBS: unit elimination, attention basis, refit, and the MACs scope."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import VIT, ZOO, batches, images, predict, redrawn, tiny
from tests.support.plans import context, plan_for
from tests.support.reference_kl import naive_elimination
from vitprune import BadInput, find_groups, prune
from vitprune.architectures import merge_heads
from vitprune.config.prune_config import HEAD_CHANNELS
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.moments import collect_unit_moments
from vitprune.criteria.obs.unit_elimination import add_ridge, eliminate_units, ridge_refit
from vitprune.criteria.obs.units import refit_update, rotate_attention, unit_obs, unit_obs_update
from vitprune.evaluation.cost import count
from vitprune.groups import all_units, shrink
from vitprune.pruning.cost_target import make_cost_model
from vitprune.pruning.macs_scope import macs_per_unit, select_by_macs
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.pruning.select import select

KINDS = ("ffn", "attention")


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((200, inputs), generator=generator, dtype=torch.float64)
    rows = torch.cat([rows @ torch.randn((inputs, inputs), generator=generator).double(), torch.ones(200, 1)], dim=1)
    metric = torch.randn((outputs, outputs), generator=generator, dtype=torch.float64)
    return torch.randn((outputs, inputs), generator=generator).double(), rows.T @ rows, metric @ metric.T


@pytest.mark.parametrize("inner", [1, 3])
def test_unit_elimination_equals_a_joint_solve_per_step(inner: int) -> None:
    weight, moments, metric = problem(12, 5)
    nats = eliminate_units(weight, moments, metric, inner, 1e-3)
    order, totals = naive_elimination(weight, add_ridge(moments, 1e-3), metric, inner)
    assert nats.argsort().tolist() == order
    level, expected = 0.0, []
    for total, before in zip(totals, [0.0, *totals], strict=False):
        level = max(level, total - before)
        expected.append(level)
    torch.testing.assert_close(nats.sort().values, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_unit_elimination_does_not_depend_on_the_compaction_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments, metric = problem(40, 6)
    full = eliminate_units(weight, moments, metric, 1, 1e-3)
    monkeypatch.setattr("vitprune.criteria.obs.unit_elimination.COMPACT_EVERY", 3)
    torch.testing.assert_close(eliminate_units(weight, moments, metric, 1, 1e-3), full, rtol=1e-6, atol=0)


def test_the_metric_is_a_sum_of_two_gradients_per_image(vit: nn.Module) -> None:
    groups, seen = find_groups(vit, ["ffn"]), batches(vit, 2, 8)
    default, two, eight = (
        collect_unit_moments(vit, groups, seen, context(fisher_directions=number), grads=True)
        for number in (None, 2, 8)
    )
    metric = next(name for name in default if name.endswith("/metric"))
    torch.testing.assert_close(default[metric], two[metric], rtol=0, atol=0)
    assert not torch.allclose(default[metric], eight[metric], rtol=1e-3, atol=0)
    assert default[metric].trace() == pytest.approx(float(eight[metric].trace()), rel=0.3)  # both are unbiased


def test_refit_recovers_duplicated_inputs_exactly() -> None:
    weight, moments, _ = problem(6, 4)
    twice = torch.cat([torch.eye(7), torch.eye(7)[:6]]).double()[
        [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 6]
    ]  # each input twice, then 1
    doubled = twice @ moments @ twice.T
    dense, bias = torch.cat([weight, weight], dim=1), torch.zeros(len(weight)).double()
    refitted, shift = ridge_refit(dense, bias, doubled[None], torch.arange(6))
    torch.testing.assert_close(refitted[:, :6], 2 * weight, rtol=0, atol=1e-3)
    assert not refitted[:, 6:].any()
    assert shift.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "attention") for name in ("vit", "odd", "extra", "swin")),
        ("vit", "qk"),
        ("vit", "vo"),
    ],
)
def test_the_attention_basis_preserves_the_function(name: str, kind: str) -> None:
    model = tiny(name)
    groups = find_groups(model, [kind])
    statistics = collect_unit_moments(model, groups, batches(model, 3, 8), DEFAULT_CONTEXT, grads=True)
    turned = copy.deepcopy(model)
    for group in groups:
        for path, value in rotate_attention(model, group, statistics, {})[0].items():
            turned.get_parameter(path).data.copy_(value)
    x = images(model)
    assert not torch.equal(turned.state_dict()[path], model.state_dict()[path])
    torch.testing.assert_close(predict(turned, x), predict(model, x), rtol=0, atol=1e-7)


def test_bases_of_qk_and_vo_together_are_those_of_both(vit: nn.Module) -> None:
    both, apart = find_groups(vit, ["attention"]), find_groups(vit, ["qk", "vo"])
    statistics = collect_unit_moments(vit, both, batches(vit, 4, 16), DEFAULT_CONTEXT, grads=True)
    assert (
        statistics.keys() == collect_unit_moments(vit, apart, batches(vit, 4, 16), DEFAULT_CONTEXT, grads=True).keys()
    )
    masks = {group.name: torch.arange(group.shape[1]).expand(group.shape) < 5 for group in both + apart}
    expected = unit_obs_update(vit, both, statistics)(masks)
    together = unit_obs_update(vit, apart, statistics)(masks)
    assert expected.keys() == together.keys()
    for name, value in expected.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ffn", "attention", "qk", "vo", "head"])
def test_the_update_reduces_the_logit_error(vit: nn.Module, kind: str) -> None:
    groups, seen, x = find_groups(vit, [kind]), batches(vit, 4, 16), images(vit, 16, 99)
    importance = unit_obs(vit, groups, seen, DEFAULT_CONTEXT)
    masks = select(importance.scores, 0.4, "head" if kind in HEAD_CHANNELS else "layer")
    plain, updated = copy.deepcopy(vit), copy.deepcopy(vit)
    assert importance.update is not None
    for path, value in importance.update(masks).items():
        updated.get_parameter(path).data.copy_(value)
    errors = [(predict(shrink(m, groups, masks), x) - predict(vit, x)).square().mean() for m in (updated, plain)]
    assert errors[0] < errors[1]


def test_updates_are_empty_if_nothing_is_removed(vit: nn.Module) -> None:
    groups = find_groups(vit, KINDS)
    statistics = collect_unit_moments(vit, groups, batches(vit), DEFAULT_CONTEXT, grads=True)
    everything = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    assert unit_obs_update(vit, groups, statistics)(everything) == {}
    assert refit_update(vit, groups, statistics)(everything) == {}


@pytest.mark.parametrize("method", ["unit-obs", "upvits-global", "upvits-refit"])
def test_saved_statistics_replace_the_images(vit: nn.Module, method: str) -> None:
    plan, noise, models = plan_for(method, 0.4), batches(vit, 3, 8), [copy.deepcopy(vit) for _ in range(2)]
    (cycle,) = prune_cycles(models[0], plan, noise)
    groups = find_groups(vit, KINDS)
    statistics = dict(plan.method.criterion(vit, groups, noise, plan.context(1)).statistics)
    list(prune_cycles(models[1], plan, [], cycle.masks, statistics))
    x = images(vit)
    assert torch.equal(predict(models[0], x), predict(models[1], x))


def test_groups_without_exactly_one_consumer_are_refused(vit: nn.Module) -> None:
    with pytest.raises(
        BadInput, match=r"^blocks.0.norm1: is a LayerNorm, unit-obs needs a rotated stream; set prune.r"
    ):
        unit_obs(vit, find_groups(vit, ["residual"]), batches(vit), DEFAULT_CONTEXT)
    merged = merge_heads(vit, find_groups(vit, ["attention"]), 1)
    with pytest.raises(
        BadInput, match=r"^blocks.0.attn: each of its 3 heads has its own basis, so heads cannot be merged"
    ):
        unit_obs(vit, merged, batches(vit), DEFAULT_CONTEXT)
    assert (
        prune(vit, "upvits-refit", sparsity={"attention": 0.5}, calibration=batches(vit, 2, 8), merge_heads_to=1)
        .model.blocks[0]
        .attn.num_heads
        == 1
    )
    with pytest.raises(BadInput, match="need images"):
        unit_obs(vit, find_groups(vit, ["ffn"]), [], DEFAULT_CONTEXT)


def test_macs_per_unit_equal_the_saved_macs(vit: nn.Module) -> None:
    groups = find_groups(vit, KINDS)
    costs, full = macs_per_unit(groups, make_cost_model(vit, groups, "macs")), count(vit, images(vit)).macs
    tokens, width, heads = 17, 48, 3
    ffn = 2 * width * tokens
    attention = heads * (4 * width * tokens + 2 * tokens**2)  # q, k, v, proj and the two products of each head
    assert costs["blocks.0.mlp"] == pytest.approx(ffn / full)
    assert costs["blocks.1.attn"] == pytest.approx(attention / full)
    weights = find_groups(vit, ["weight"])
    with pytest.raises(BadInput, match="scope macs cannot rank units of kind 'weight'"):
        macs_per_unit(weights, lambda masks: 1.0)


def test_macs_scope_removes_the_least_importance_per_mac(vit: nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    scores = {group.name: torch.arange(group.units).double() * (1 + n) for n, group in enumerate(groups)}
    costs = {groups[0].name: 1.0, groups[1].name: 4.0}
    # score per MAC: n and n / 2; 192 units each, half of 960 to remove
    masks = select_by_macs(scores, 0.5, groups, costs, all_units(groups), {})
    removed = [int((~masks[group.name]).sum()) for group in groups]
    assert removed == [54, 106]  # if scores per MAC are equal, units of the first group are removed first
    assert all(bool(masks[g.name][n:].all()) for g, n in zip(groups, removed, strict=True))


def test_macs_masks_are_nested_in_the_sparsity(vit: nn.Module) -> None:
    groups = find_groups(vit, KINDS)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.shape, generator=generator) for group in groups}
    costs = macs_per_unit(groups, make_cost_model(vit, groups, "macs"))
    before = all_units(groups)
    for share in (0.0, 0.2, 0.5, 0.9, 0.999):
        masks = select_by_macs(scores, share, groups, costs, all_units(groups), {})
        again = select_by_macs(scores, share, groups, costs, before, {})
        for group in groups:
            rows = masks[group.name].reshape(-1, group.shape[-1])
            assert len(set(rows.sum(dim=1).tolist())) == 1
            assert rows.any(dim=1).all()
            assert torch.equal(again[group.name], masks[group.name])
            assert bool((before[group.name] | ~masks[group.name]).all())
        spent = sum(costs[g.name] * float((~masks[g.name]).float().mean()) * g.shape[-1] for g in groups)
        assert spent <= share * sum(costs[g.name] * g.shape[-1] for g in groups) + 1e-12
        before = masks


def test_kinds_in_one_macs_pool_need_one_sparsity() -> None:
    with pytest.raises(BadInput, match=r"ffn, attention share one fraction of the MACs; give all the same"):
        plan_for("unit-obs", {"ffn": 0.5, "attention": 0.4})
    assert plan_for("unit-obs", {"ffn": 0.5, "attention": 0.4}, "layer").macs_kinds == []
    assert plan_for("channel-taylor", 0.5, "macs").macs_kinds == ["ffn", "attention"]


@pytest.mark.parametrize("cycles", [1, 3])
def test_a_target_in_macs_over_all_kinds(vit: nn.Module, cycles: int) -> None:
    full = count(vit, images(vit)).macs
    list(prune_cycles(vit, plan_for("unit-obs", None, target={"macs": 0.6}, cycles=cycles), batches(vit, 2, 8)))
    assert 0.57 < count(vit, images(vit)).macs / full <= 0.6


@pytest.mark.parametrize("method", ["unit-obs", "upvits-global"])
def test_the_only_head_of_a_stage_is_kept(method: str) -> None:
    architecture, args = ZOO["pvt"]
    model = redrawn(timm.create_model(architecture, **args | {"num_heads": (1, 2, 4)}), 0)
    heads = [group.units for group in find_groups(model, ["head"])]
    assert 1 in heads
    pruned = prune(
        model, method, sparsity={"head": 0.6}, calibration=batches(model, 2, 4), example_input=images(model)
    ).model
    remaining = [group.units for group in find_groups(pruned, ["head"])]
    assert [now for now, before in zip(remaining, heads, strict=True) if before == 1] == [1] * heads.count(1)
    assert sum(remaining) < sum(heads)


def test_second_moments_do_not_depend_on_the_memory_limit() -> None:
    vit = tiny("vit")
    result = [
        collect_unit_moments(vit, find_groups(vit, KINDS), batches(vit), context(memory=m), grads=True)
        for m in (1, 1 << 30)
    ]
    for name, value in result[0].items():
        torch.testing.assert_close(value, result[1][name], rtol=1e-9, atol=1e-12)


def test_calibration_images_of_few_classes_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for classes, warned in ((120, True), (7, False)):
        model = timm.create_model("vit_tiny_patch16_224", **VIT | {"num_classes": classes}).eval()
        alike = torch.rand(1, 3, 32, 32).expand(40, -1, -1, -1)
        prune(model, "unit-obs", sparsity={"ffn": 0.25}, calibration=[alike])
        line = "calibration: on these 40 images the model answers only 1 of its 120 classes; the pruned model can lose"
        assert (line in capsys.readouterr().err) == warned
