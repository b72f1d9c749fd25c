"""Cost targets: reached from below, by less than one unit, verified on the pruned model."""

import copy
import itertools
import json
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.model_zoo import VIT, batches, cost, same_state, state, tiny, with_simulated_clock
from tests.support.plans import plan_for
from vitprune import BadInput, count, find_groups, prune, save, shrink
from vitprune.architectures import merge_heads
from vitprune.config.params import Params
from vitprune.criteria import magnitude as by_weights
from vitprune.criteria.kl import leave_one_out as by_kl
from vitprune.data import example_input
from vitprune.models.weights import read_weights, write_weights
from vitprune.pipeline import mask_stage
from vitprune.pruning.cost_target import least_scalar, make_cost_model
from vitprune.pruning.cycle_masks import cycle_state, select_masks
from vitprune.pruning.prune_cycles import prune_cycles

pytestmark = pytest.mark.usefixtures("drawn")


def nonzero(model: nn.Module, what: str) -> int:
    result = count(model, example_input(model, 1))
    return result.nonzero_params if what == "params" else result.nonzero_macs


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {}),
        ("vit", {"scope": "global"}),
        ("vit", {"sparsity": {"ffn": 0.8, "attention": 0.4, "residual": 0.2}, "merge_heads_to": 1}),
        ("vit", {"sparsity": {"residual": 0.5}}),
        ("odd", {"sparsity": {"ffn": 1.0, "block": 0.5}}),
        ("swin", {"scope": "isomorphic"}),
        ("pvt", {"sparsity": {"ffn": 0.8, "attention": 0.8, "residual": 0.4}}),
    ],
)
def test_a_target_is_reached_from_below_by_less_than_one_unit(name: str, settings: dict, what: str) -> None:
    model = tiny(name)
    limit, full = 0.6, cost(model, what)
    settings = {"sparsity": None} | settings
    pruned = prune(model, "drawn", target={what: limit}, **settings).model
    reached = cost(pruned, what) / full
    assert reached <= limit
    kinds = plan_for("drawn", **settings, target={what: limit}).sparsity
    groups = merge_heads(model, find_groups(model, kinds), settings.get("merge_heads_to"))
    assert limit - reached < largest_step(model, groups, what, "scope" in settings)


def largest_step(model: nn.Module, groups: list, what: str, pooled: bool) -> float:
    """Cost of one unit from every pool at once; attention is never pooled, other groups may form one pool."""
    share, everything = (
        make_cost_model(model, groups, what),
        {g.name: torch.ones(g.shape, dtype=torch.bool) for g in groups},
    )
    alone, together = 0.0, 0.0
    for group in groups:
        mask = torch.ones(group.shape, dtype=torch.bool)
        (mask.T if group.kind == "attention" else mask)[: 2 if group.kind == "block" else 1] = False
        step = 1 - share(everything | {group.name: mask})
        together += 0 if pooled and group.kind != "attention" else step
        alone = max(alone, step) if pooled and group.kind != "attention" else alone
    return alone + together + 1e-9


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("method", ["magnitude", "uniform", "dimap"])
def test_single_weights_count_nonzero_values(vit: nn.Module, method: str, what: str) -> None:
    full = nonzero(vit, what)
    pruned = prune(vit, method, target={what: 0.4}).model
    reached = nonzero(pruned, what) / full
    pools, tokens = {"magnitude": 1, "uniform": 8, "dimap": 3}[method], 17
    assert 0 <= 0.4 - reached <= pools * (tokens if what == "macs" else 1) / full


def test_the_cost_model_equals_the_count_of_the_shrunk_model(vit: nn.Module) -> None:
    groups = find_groups(vit, ["ffn", "attention", "residual"])
    before = state(vit)
    plan = plan_for("drawn", {"ffn": 0.3, "attention": 0.2, "residual": 0.4})
    scores = by_weights.random(vit, groups, (), plan.context(0)).scores
    masks = select_masks(scores, plan, plan.targets()[0], cycle_state(vit, plan))
    for what in ("params", "macs"):
        expected = cost(shrink(copy.deepcopy(vit), groups, masks), what) / cost(vit, what)
        assert make_cost_model(vit, groups, what)(masks) == expected
    assert same_state(vit, before)


def test_latency_alternates_with_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_simulated_clock(timm.create_model("vit_tiny_patch16_224", **VIT | {"depth": 6}), monkeypatch)
    thin = prune(model, "drawn", sparsity={"block": 1.0}, target={"latency": 0.6}).model
    assert len(thin.blocks) == 3


def test_sparsities_per_kind_are_relative_with_a_target(vit: nn.Module) -> None:
    shares = {"ffn": 0.8, "attention": 0.4}, {"ffn": 0.2, "attention": 0.1}
    pruned = [prune(vit, "drawn", sparsity=share, target={"macs": 0.5}).model for share in shares]
    assert same_state(pruned[0], state(pruned[1]))
    ffn, attention = pruned[0].blocks[0].mlp.fc1.out_features / 192, pruned[0].blocks[0].attn.head_dim / 16
    assert 1 - attention == pytest.approx((1 - ffn) / 2, abs=1 / 16)


def test_cycles_approach_the_target_on_the_schedule(vit: nn.Module) -> None:
    full, seen = cost(vit, "macs"), []
    for cycle in prune_cycles(vit, plan_for("drawn", None, cycles=3, schedule="linear", target={"macs": 0.4}), ()):
        reached = cost(vit, "macs") / full
        seen.append((cycle.cost["macs"]["target"], reached))
        assert cycle.cost["macs"]["reached"] == reached
        assert set(cycle.target) == {"ffn", "attention"}
    assert [limit for limit, _ in seen] == pytest.approx([0.8, 0.6, 0.4])
    assert all(limit - 0.05 < reached <= limit for limit, reached in seen)


def test_blocks_are_removed_one_by_one_until_the_target_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("odd")
    full = cost(model, "macs")
    (cycle,) = prune_cycles(model, plan_for("upvits-blocks", None, target={"macs": 0.5}), batches(model, 1))
    assert len(model.blocks) == 1
    assert cycle.cost["macs"]["reached"] == cost(model, "macs") / full <= 0.5
    other = tiny("odd")
    groups, plan = find_groups(other, ["block"]), plan_for("upvits-blocks", None, target={"macs": 0.5})
    scores = by_kl.leave_one_out_kl(other, groups, batches(other, 1), plan.context(0)).scores
    first = select_masks(scores, plan, {"block": 1 / 3}, cycle_state(other, plan))
    (again,) = prune_cycles(other, plan, batches(other, 1), first)
    assert torch.equal(again.masks["blocks"], cycle.masks["blocks"])


def test_the_search_by_hand() -> None:
    def masks_at(scalar: float) -> dict[str, Tensor]:
        return {"a": torch.arange(10) >= int(scalar * 10 + 0.5)}

    def share_of(masks: dict[str, Tensor]) -> float:
        return float(masks["a"].sum()) / 10

    remaining = [
        int(masks_at(least_scalar(masks_at, share_of, limit)[1])["a"].sum()) for limit in (0.95, 0.5, 0.49, 0.1, 0.0)
    ]
    assert remaining == [9, 5, 4, 1, 0]
    assert least_scalar(masks_at, share_of, 1.0) == (0.0, 0.0)
    with pytest.raises(BadInput, match=r"^prune.target: 0.2 of the dense model .* the smallest is 0.3000$"):
        least_scalar(masks_at, lambda masks: 0.3 + share_of(masks), 0.2)


@pytest.mark.parametrize(("power", "most"), [(1.0, 10), (0.5, 15), (3.0, 15), (0.2, 21)])
def test_the_search_counts_few_candidates(power: float, most: int) -> None:
    units, counted = torch.arange(100_000), []

    def masks_at(scalar: float) -> dict[str, Tensor]:
        return {"a": units >= int(scalar * len(units))}

    def cost(masks: dict[str, Tensor]) -> float:
        counted.append(float(masks["a"].double().mean()) ** power)
        return counted[-1]

    for limit in (0.9, 0.5, 0.3):
        counted.clear()
        low, high = least_scalar(masks_at, cost, limit)
        assert len(counted) <= most  # bisection: 19
        assert cost(masks_at(high)) <= limit < cost(masks_at(low))
        assert int(high * len(units)) - int(low * len(units)) == 1


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        (
            "drawn",
            {"target": {"macs": 0.01}},
            r"^prune.target: 0.01 of the dense model cannot be reached, the smallest is 0.\d{4} \(.* MACs\); the dense",
        ),
        ("drawn", {"target": {"flops": 0.5}}, r"^prune.target.flops: unknown key; remove it or correct its name$"),
        (
            "drawn",
            {"target": {}},
            r"^prune.target: give one cost of params, macs, latency, latency_ms, got {}$",
        ),
        (
            "drawn",
            {"target": {"macs": 0.5, "params": 0.5}},
            r"^prune.target: give one cost of params, macs, latency, latency_ms, got {",
        ),
        (
            "drawn",
            {"target": {"macs": 1.0}},
            r"^prune.target.macs: give a fraction of the dense model between 0 and 1, or .*, got 1.0$",
        ),
        (
            "drawn",
            {"target": {"macs": float("nan")}},
            r"^prune.target.macs: nan is no quantity; give a fraction, .*, got nan$",
        ),
        (
            "drawn",
            {"target": {"macs": 0.5}, "sparsity": 0.5},
            r"^prune.target: give a target or one sparsity, not both; ",
        ),
        (
            "drawn",
            {"target": {"macs": 0.5}, "sparsity": {"ffn": 0.0}},
            r"^prune.sparsity: all shares are 0, so no target can be reached",
        ),
        (
            "drawn",
            {"target": {"macs": 0.5}, "sparsity": {"ffn": -1.0}},
            r"^prune.sparsity.ffn: Input should be greater than or equal to 0, got -1.0$",
        ),
        (
            "drawn",
            {"target": {"macs": 0.5}, "sparsity": {"weight": 1.0}},
            r"^prune.sparsity.weight: method drawn",
        ),
        (
            "lamp",
            {"target": {"latency": 0.5}},
            r"^prune.target.latency: zeroed single weights do not run faster; use params or macs$",
        ),
        (
            "n:m",
            {"target": {"macs": 0.5}},
            r"^prune.target: an N:M scope implies the sparsity; set the target to null$",
        ),
    ],
)
def test_invalid_targets_are_refused(vit: nn.Module, method: str, settings: dict, why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        prune(vit, method, sparsity=settings.pop("sparsity", None), **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_mask_stage_writes_the_resolved_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    model = {"name": "vit_tiny_patch16_224", "args": VIT}
    full = cost(tiny("vit"), "params")
    target = {"params": f"{0.7 * full / 1000}K" if absolute else 0.7}
    prune_ = {"method": "channel-magnitude", "kinds": ["ffn"], "sparsity": None, "target": target}
    settings = {"dataset": {"source": "digits"}, "model": model, "dense": {"start": "train"}, "prune": prune_}
    monkeypatch.chdir(tmp_path)
    dense = tiny("vit").float()
    save(dense, tmp_path / "out/dense")
    groups = find_groups(dense, ["ffn"])
    write_weights(
        by_weights.magnitude(dense, groups, (), plan_for("uniform", 0.5).context(0)).scores,
        tmp_path / "out/score/scores.safetensors",
    )
    mask_stage.run(Params.model_validate(settings))
    facts = json.loads(Path("metrics/mask.json").read_text())
    shrink(dense, groups, read_weights(tmp_path / "out/mask/masks.safetensors"))
    reached = cost(dense, "params") / full
    result = {"target": round(0.7 * full), "reached": cost(dense, "params"), "dense": full}
    assert facts["cost"] == {"params": result if absolute else {"target": 0.7, "reached": reached}}
    assert facts["target"]["ffn"] == pytest.approx(facts["sparsity"]["ffn"], abs=1 / 192)
    assert 0.69 < reached <= 0.7


def test_a_disturbed_latency_measurement_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    model, calls = tiny("vit"), itertools.count()
    model.register_forward_pre_hook(lambda module, args: time.sleep(0.03 * (next(calls) % 2)))
    make_cost_model(model, find_groups(model, ["ffn"]), "latency_ms")
    assert "warning: prune.target.latency_ms: the dense model takes " in capsys.readouterr().err
