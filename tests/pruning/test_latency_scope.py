"""Allocation by a latency table: dynamic programming against all choices, and targets whose optimum is known."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.support.model_zoo import VIT, tiny
from tests.support.plans import plan_for
from vitprune import BadInput, find_groups, prune, save
from vitprune.config.params import Params
from vitprune.criteria import magnitude as by_weights
from vitprune.groups import Group, all_units
from vitprune.models.weights import read_weights, write_weights
from vitprune.pipeline import mask_stage
from vitprune.pipeline.check_settings import check_settings
from vitprune.pipeline.sweep_plan import read_sweep, runs_of
from vitprune.pruning.constraints import Constraint
from vitprune.pruning.latency_scope import RESOLUTION, WidthOptions, best_widths, select_by_latency
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]


def options_of(seed: int, groups: int) -> list[WidthOptions]:
    """Return random options, whose losses and times are not ordered."""
    random, result = np.random.default_rng(seed), []
    for _ in range(groups):
        count = random.integers(1, 6)
        result.append(
            WidthOptions(np.arange(1, count + 1), random.exponential(size=count), random.uniform(1, 9, count))
        )
    return result


@pytest.mark.parametrize("seed", range(20))
def test_the_result_is_the_best_of_all_choices(seed: int) -> None:
    options = options_of(seed, groups=4)
    fastest, slowest = (sum(least(group.milliseconds) for group in options) for least in (np.min, np.max))
    limit = fastest + (seed + 1) / 22 * (slowest - fastest)
    chosen = [int(width) - 1 for width in best_widths(options, limit)]
    assert times(options, chosen) <= limit
    choices = itertools.product(*(range(len(group.widths)) for group in options))
    within = [choice for choice in choices if times(options, choice) <= limit - 4 * (slowest - fastest) / RESOLUTION]
    assert losses(options, chosen) <= min(losses(options, choice) for choice in within) + 1e-12


def times(options: list[WidthOptions], choice: tuple[int, ...] | list[int]) -> float:
    return sum(float(group.milliseconds[number]) for group, number in zip(options, choice, strict=True))


def losses(options: list[WidthOptions], choice: tuple[int, ...] | list[int]) -> float:
    return sum(float(group.losses[number]) for group, number in zip(options, choice, strict=True))


def test_without_a_choice_within_the_limit_every_group_has_its_smallest_time() -> None:
    options = options_of(0, groups=3)
    expected = [int(group.widths[group.milliseconds.argmin()]) for group in options]
    assert best_widths(options, 0.0) == expected


A, B = Group("a", "ffn", (4,), ()), Group("b", "attention", (2, 3), ())
SCORES = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([[0.5, 9.0, 0.1], [0.2, 0.4, 9.0]])}
TIMES = {"a": np.array([1.0, 1.0, 2.0, 5.0, 5.0]), "b": np.array([0.0, 0.0, 4.0, 6.0])}  # savings: 0, 3, 4 and 2, 6


@pytest.mark.parametrize(
    ("milliseconds", "a", "b"),
    [
        (2.0, [1, 1, 1, 1], [[1, 1, 0], [0, 1, 1]]),  # b: 0.1 + 0.2
        (3.0, [1, 1, 1, 1], [[0, 1, 0], [0, 0, 1]]),  # b: 0.3 + 0.5 + 0.4; a would save 3 ms and lose 1 + 2
        (8.0, [1, 0, 1, 0], [[0, 1, 0], [0, 0, 1]]),  # a of width 3 would save nothing
        (10.0, [1, 0, 0, 0], [[0, 1, 0], [0, 0, 1]]),
    ],
)
def test_the_optimum_by_hand(milliseconds: float, a: list[int], b: list[list[int]]) -> None:
    masks = select_by_latency(SCORES, milliseconds / 10, [A, B], TIMES, all_units([A, B]), {})
    assert masks["b"].int().tolist() == b
    assert masks["a"].int().tolist() == a


def test_constraints_and_earlier_removals_are_respected() -> None:
    bounds = {"b": Constraint(0.0, 0.0)}
    assert select_by_latency(SCORES, 0.4, [A, B], TIMES, all_units([A, B]), bounds)["a"].int().tolist() == [1, 0, 0, 0]
    previous = {"a": torch.tensor([0, 1, 1, 1]).bool(), "b": torch.ones(2, 3).bool()}
    masks = select_by_latency(SCORES, 0.3, [A, B], TIMES, previous, {"b": Constraint(0.0, 0.0)})
    assert masks["a"].int().tolist() == [0, 0, 1, 1]
    assert masks["b"].all()


def table(path: Path, rows: str) -> Path:
    """Write a table in which FFNs of both blocks take 1 ms less at width 1, and half of that at half of the width."""
    path.write_text("group,width,milliseconds\nmodel,,4\n" + rows)
    return path


FLAT = "blocks.*.attn,16,1\n"  # narrower attention saves nothing
BOTH = FLAT + "blocks.*.mlp,1,0\nblocks.*.mlp,192,1\n"
FIRST = FLAT + "blocks.0.mlp,1,0\nblocks.0.mlp,192,1\nblocks.1.mlp,192,1\n"


@pytest.mark.usefixtures("drawn")
def test_only_groups_that_save_time_are_pruned(vit: nn.Module, tmp_path: Path) -> None:
    path = table(tmp_path / "table.csv", FIRST)
    result = prune(vit, "drawn", scope="macs", target={"latency": 0.875, "table": str(path)})
    assert {name: int(mask.sum()) for name, mask in result.masks.items() if not mask.all()} == {"blocks.0.mlp": 96}
    assert result.target_miss == ""


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("target", [{"latency": 0.75}, {"latency_ms": 3.0}])
def test_other_scopes_reach_the_target_by_a_search(vit: nn.Module, tmp_path: Path, target: dict[str, float]) -> None:
    path = table(tmp_path / "table.csv", BOTH)
    settings = {"kinds": ["ffn"], "target": target | {"table": path}}
    (cycle,) = prune_cycles(vit, plan_for("drawn", **settings), ())
    ((cost, record),) = cycle.cost.items()
    assert record["reached"] <= record["target"]
    assert [int(mask.sum()) for mask in cycle.masks.values()] == [96, 96]  # of 192: 2 * 95 / 191 of 1 ms
    assert cost == next(iter(target))


@pytest.mark.usefixtures("drawn")
def test_cycles_approach_the_target(vit: nn.Module, tmp_path: Path) -> None:
    target = {"latency": 0.6, "table": table(tmp_path / "table.csv", BOTH)}
    plan, widths = plan_for("drawn", scope="macs", target=target, cycles=2, schedule="linear"), []
    for cycle in prune_cycles(vit, plan, ()):
        reached = cycle.cost["latency"]
        assert reached["target"] * 0.999 <= reached["reached"] <= reached["target"]
        widths.append(sum(int(mask.sum()) for name, mask in cycle.masks.items() if name.endswith("mlp")))
    assert widths == [384 - round(0.8 * 191 + 0.5), 384 - round(1.6 * 191 + 0.5)]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("target", "rows", "why"),
    [
        ({"latency": 0.4}, BOTH, r"^prune.target: 0.4 of the dense model cannot be reached, the smallest is 0.5000 "),
        ({"latency_ms": 5.0}, BOTH, r"^prune.target: 5 ms is not less than the dense model has; the smallest is "),
        ({"latency": 0.5}, FLAT, r"table.csv: no row names group blocks.0.mlp"),
        ({"macs": 0.5}, BOTH, r"^prune.target.table: is for latency and latency_ms; remove it, got "),
    ],
)  # fmt: skip
def test_unreachable_targets_are_refused(
    vit: nn.Module, tmp_path: Path, target: dict[str, float], rows: str, why: str
) -> None:
    path = str(table(tmp_path / "table.csv", rows))
    with pytest.raises(BadInput, match=why) as refused:
        prune(vit, "drawn", scope="macs", target=target | {"table": path})
    assert "\n" not in str(refused.value)


def test_the_mask_stage_and_the_checks_before_it_use_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["model"] = {"name": "vit_tiny_patch16_224", "args": VIT}
    target = {"latency": 0.75, "table": "table.csv"}
    raw["prune"] |= {"method": "channel-magnitude", "kinds": ["ffn"], "sparsity": None, "target": target, "cycles": 1}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"^table.csv: No such file or directory; record one"):
        check_settings(Params.model_validate(raw))
    table(tmp_path / "table.csv", BOTH)
    check_settings(Params.model_validate(raw))
    dense = tiny("vit").float()
    save(dense, tmp_path / "out/dense")
    groups = find_groups(dense, ["ffn"])
    scores = by_weights.magnitude(dense, groups, (), plan_for("uniform", 0.5).context(0)).scores
    write_weights(scores, tmp_path / "out/score/scores.safetensors")
    mask_stage.run(Params.model_validate(raw))
    masks = read_weights(tmp_path / "out/mask/masks.safetensors")
    assert [int(mask.sum()) for mask in masks.values()] == [96, 96]
    cost = json.loads(Path("metrics/mask.json").read_text())["cost"]
    assert cost == {"latency": {"target": 0.75, "reached": pytest.approx(1 - 2 * 96 / 191 / 4)}}


def test_a_sweep_passes_the_table_to_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["model"] = {"name": "vit_tiny_patch16_224", "args": VIT}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "sweep.yaml").write_text("methods: [unit-obs]\ntargets: [{latency: 0.75, table: table.csv}]\n")
    table(tmp_path / "table.csv", BOTH)
    monkeypatch.chdir(tmp_path)
    (run,) = runs_of(read_sweep(tmp_path / "sweep.yaml"), tmp_path / "params.yaml")
    assert run.params["prune"]["target"] == {"latency": 0.75, "table": "table.csv"}
    assert run.name == "unit-obs-latency-0.75-table-table.csv"
