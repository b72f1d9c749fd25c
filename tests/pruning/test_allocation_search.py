"""Search of the sparsity of every group: the strategy on known functions, and the search on tiny models."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.support.model_zoo import batches, tiny
from tests.support.plans import plan_for
from vitprune import METHODS, AllocationConfig, BadInput, PruneResult, prune
from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.groups import Group, Masks
from vitprune.models.weights import read_weights
from vitprune.pipeline import stages
from vitprune.pruning.allocation_search import AllocationSearch, ReusedUpdates, coarse, halves
from vitprune.pruning.constraints import Constraint
from vitprune.pruning.cycle_masks import cycle_state
from vitprune.pruning.evolution_strategy import minimize
from vitprune.pruning.methods import Method
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]


def test_the_strategy_finds_the_minimum_of_a_quadratic_function() -> None:
    middle = np.linspace(-1, 1, 6)
    result = minimize(lambda point: float(((point - middle) ** 2 * np.arange(1, 7)).sum()), 6, 600, 0, 0.5, "")
    assert result.point == pytest.approx(middle, abs=0.02)
    assert result.start == pytest.approx(
        sum(value**2 * weight for value, weight in zip(middle, range(1, 7), strict=True))
    )
    assert result.evaluations == 1 + 10 * (599 // 10) <= 600  # 4 + 3 ln 6 = 9.4, even


def test_the_strategy_is_deterministic_and_never_worse_than_its_start() -> None:
    def run(seed: int) -> list[float]:
        return minimize(lambda point: float(np.abs(point).sum()), 3, 40, seed, 1.0, "").point.tolist()

    assert run(1) == run(1) == [0.0, 0.0, 0.0]  # the start is the minimum
    seen: list[list[float]] = []
    for seed in (1, 1, 2):
        points: list[float] = []
        minimize(lambda point, points=points: points.append(float(point[0])) or 0.0, 2, 10, seed, 1.0, "")
        seen.append(points)
    assert seen[0] == seen[1] != seen[2]


def test_every_second_image_is_used_to_compare_candidates() -> None:
    images = torch.arange(7.0).view(7, 1)
    fit, judge = halves([(images[:3], images[:3, 0]), (images[3:4], images[3:4, 0]), (images[4:], images[4:, 0])])
    assert [part.flatten().tolist() for part, _ in fit] == [[0, 2], [4, 6]]
    assert [part.flatten().tolist() for part, _ in judge] == [[1], [3], [5]]
    with pytest.raises(BadInput, match=r"^prune.allocation: 1 calibration images; give at least 2, half of them are"):
        halves([(images[:1], images[:1, 0])])


def test_values_of_an_update_are_computed_once_per_width_within_the_memory() -> None:
    calls: list[tuple[str, int]] = []

    def update(masks: Masks) -> dict[str, Tensor]:
        ((name, mask),) = masks.items()
        calls.append((name, int(mask.sum())))
        return {name: torch.full((4,), float(mask.sum()))}

    masks = [{"a": torch.arange(4) < 2, "b": torch.arange(4) < 3}, {"a": torch.arange(4) < 1, "b": torch.arange(4) < 3}]
    roomy, tight = ReusedUpdates(update, 1 << 20), ReusedUpdates(update, 16)
    for reused, number in ((roomy, 3), (tight, 6)):
        calls.clear()
        results = [reused(each) for each in (masks[0], masks[1], masks[0])]
        assert [result["a"][0] for result in results] == [2, 1, 2]
        assert [result["b"][0] for result in results] == [3, 3, 3]
        assert len(calls) == number


def test_groups_without_a_rule_have_widths_in_multiples() -> None:
    groups = [Group(name, "ffn", (256,), ()) for name in ("free", "fixed", "narrow", "rounded", "few")]
    groups[-1] = Group("few", "attention", (2, 16), ())
    given = {"fixed": Constraint(0.3, 0.3), "narrow": Constraint(0.502, 0.51), "rounded": Constraint(multiple=64)}
    expected = {"free": Constraint(multiple=8), "few": Constraint(multiple=1)}
    assert coarse(groups, given) == given | expected


def scores_by_group(values: dict[str, float]) -> Method:
    """Return a method whose scores depend on the group alone, except for the order inside it, and are wrong."""

    def criterion(model: nn.Module, groups: list[Group], batches: Batches, context: ScoringContext) -> Importance:
        ramp = {group.name: 1 + torch.arange(group.units).view(group.shape) * 1e-3 for group in groups}
        return Importance({group.name: values[group.name] * ramp[group.name] for group in groups})

    return Method(criterion, {"ffn": "macs"}, ("ffn",), True, "for these tests")


@pytest.fixture
def unequal(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose first FFN has no effect, and a method that scores it a hundred times as high as the second."""
    model = tiny("vit").float()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
        model.blocks[1].mlp.fc2.weight.mul_(5)
    monkeypatch.setitem(METHODS, "wrong", scores_by_group({"blocks.0.mlp": 100.0, "blocks.1.mlp": 1.0}))
    return model


def table(path: Path) -> dict[str, Any]:
    path.write_text("group,width,milliseconds\nmodel,,4\nblocks.*.mlp,1,0\nblocks.*.mlp,192,1\n")
    return {"latency": 0.8, "table": str(path)}


def shares(result: PruneResult) -> list[float]:
    return [float(mask.double().mean()) for mask in result.masks.values()]


@pytest.mark.parametrize("goal", ["macs", "params", "latency"])
def test_the_search_corrects_wrong_scores_of_groups(unequal: nn.Module, tmp_path: Path, goal: str) -> None:
    target = table(tmp_path / "table.csv") if goal == "latency" else {goal: 0.8}
    config = AllocationConfig(evaluations=25, spread=3.0)
    result = prune(unequal, "wrong", calibration=batches(unequal, 2), allocation=config, target=target)
    assert shares(result)[0] < shares(result)[1]
    facts = result.allocation
    assert facts["nats_after"] < 0.5 * facts["nats_before"]
    assert facts["evaluations"] == 25
    assert "allocation: held-out KL divergence" in str(result)
    assert result.target_miss == ""


def test_the_search_does_not_change_the_sparsity(unequal: nn.Module) -> None:
    given, config = batches(unequal, 2), AllocationConfig(evaluations=25, spread=3.0)
    plain, searched = (
        prune(unequal, "wrong", sparsity=0.4, calibration=given, allocation=allocation)
        for allocation in (False, config)
    )
    assert shares(plain)[0] > 0.9 > shares(plain)[1]
    assert shares(searched)[0] < shares(searched)[1]
    assert sum(shares(searched)) == pytest.approx(sum(shares(plain)), abs=1 / 192)
    assert plain.allocation == {}


def test_the_mask_stage_searches_on_the_calibration_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        METHODS, "wrong", scores_by_group({f"blocks.{number}.mlp": 10.0**-number for number in range(2)})
    )
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["model"]["args"] |= {"depth": 2, "embed_dim": 48, "num_heads": 3}
    raw["dense"]["train"]["epochs"], raw["calibrate"]["size"] = 1, 20
    raw["prune"] |= {"method": "wrong", "sparsity": 0.5, "cycles": 1, "allocation": {"evaluations": 7}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    for stage in ("dataset", "dense", "calibrate", "score", "mask"):
        stages.run(stage, tmp_path)
    facts, scores = json.loads(Path("metrics/mask.json").read_text()), read_weights(Path("out/mask/scores.safetensors"))
    assert facts["allocation"]["nats_after"] <= facts["allocation"]["nats_before"]
    assert facts["allocation"]["evaluations"] == 7
    before = read_weights(Path("out/score/scores.safetensors"))
    factors = {name: scores[name] / before[name] for name in before}
    assert all(torch.allclose(factor, factor[0]) for factor in factors.values())


def test_fewer_evaluations_than_a_generation_are_refused(unequal: nn.Module) -> None:
    config = AllocationConfig(evaluations=6)
    with pytest.raises(BadInput, match=r"^prune.allocation.evaluations 6: 2 groups need at least 7$"):
        prune(unequal, "wrong", sparsity=0.4, calibration=batches(unequal, 2), allocation=config)


def test_the_order_inside_a_group_is_that_of_the_scores(unequal: nn.Module) -> None:
    result = prune(
        unequal,
        "wrong",
        target={"macs": 0.8},
        calibration=batches(unequal, 2),
        allocation=AllocationConfig(evaluations=7),
    )
    for mask in result.masks.values():
        assert mask.tolist() == sorted(mask.tolist())  # scores ascend


def test_the_same_seed_gives_the_same_masks_in_every_cycle(unequal: nn.Module) -> None:
    def run(seed: int) -> list[dict[str, list[bool]]]:
        plan = plan_for("wrong", 0.6, cycles=2, allocation={"evaluations": 7, "spread": 2.0})
        plan = type(plan)(**{**vars(plan), "seed": seed})
        cycles = prune_cycles(copy.deepcopy(unequal), plan, batches(unequal, 2))
        return [{name: mask.tolist() for name, mask in cycle.masks.items()} for cycle in cycles]

    first, again = run(0), run(0)
    assert first == again
    assert all(
        not late or early for name in first[0] for early, late in zip(first[0][name], first[1][name], strict=True)
    )


def test_the_zero_point_is_the_ranking_without_a_search(unequal: nn.Module) -> None:
    plan = plan_for("wrong", 0.4, allocation={})
    state = cycle_state(unequal, plan)
    given = batches(unequal, 2)
    search = AllocationSearch(unequal, plan, state, *halves(given))
    pruned = prune(unequal, "wrong", sparsity=0.4, round_to=6, calibration=given).model
    images = torch.cat([images for images, _ in halves(given)[1]])
    log_p, log_q = (model.eval()(images).detach().double().log_softmax(-1) for model in (unequal, pruned))
    assert search.nats(np.zeros(2)) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        ("channel-magnitude", {"sparsity": 0.5}, r"^prune.allocation: is for units that compete per MAC; use"),
        ("lamp", {"sparsity": 0.5}, r"^prune.allocation: is for units that compete"),
        ("channel-magnitude", {"sparsity": {"residual": 0.5}, "scope": "macs"}, r"^prune.allocation: is for units"),
        ("unit-obs", {"target": {"latency": 0.5}}, r"^prune.allocation: a latency target needs prune.target.table"),
        ("unit-obs", {"sparsity": 0.5, "allocation": {"evaluations": 0}}, r"^prune.allocation.evaluations: Input "),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_searched_are_refused(method: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        plan_for(method, **({"allocation": {}} | settings))
