"""Targets in parameters, MACs and milliseconds; unreachable targets and misses are explained."""

import copy
import re

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.model_zoo import VIT, cost, same_state, state, tiny, with_simulated_clock
from tests.support.plans import plan_for
from vitprune import BadInput, count, find_groups, prune, shrink
from vitprune.config.prune_config import Schedule
from vitprune.config.quantity import format_cost, number_of
from vitprune.data import example_input
from vitprune.evaluation.latency import latency
from vitprune.pruning.cost_target import refine_latency
from vitprune.pruning.prune_cycles import prune_cycles

pytestmark = pytest.mark.usefixtures("drawn")


@pytest.mark.parametrize(("what", "suffix"), [("macs", ""), ("params", "K"), ("macs", "M"), ("params", "G")])
def test_an_absolute_target_equals_its_fraction(vit: nn.Module, what: str, suffix: str) -> None:
    full = cost(vit, what)
    number = int(0.6 * full)
    text: int | str = number if not suffix else f"{number / {'K': 1e3, 'M': 1e6, 'G': 1e9}[suffix]:.12f}{suffix}"
    by_fraction = prune(vit, "drawn", target={what: number / full}).model
    pruned = copy.deepcopy(vit)
    (cycle,) = prune_cycles(pruned, plan_for("drawn", None, target={what: text}), ())
    assert same_state(pruned, state(by_fraction))
    record = cycle.cost[what]
    assert record | {"why": ""} == {"target": number, "reached": cost(pruned, what), "dense": full, "why": ""}
    assert number * 0.95 < record["reached"] <= number
    assert ("why" in record) == (record["reached"] < number * 0.98)


def test_single_weights_have_absolute_targets_too(vit: nn.Module) -> None:
    pruned = prune(vit, "magnitude", target={"params": 30_000}).model
    assert count(pruned, example_input(pruned, 1)).nonzero_params == 30_000


def test_cycles_approach_an_absolute_target(vit: nn.Module) -> None:
    full, plan = cost(vit, "params"), plan_for("drawn", None, cycles=2, schedule="linear", target={"params": "40K"})
    limits = iter(((full + 40_000) / 2, 40_000))
    for cycle in prune_cycles(vit, plan, ()):
        record = cycle.cost["params"]
        assert record["target"] == pytest.approx(next(limits), abs=1)
        assert record["reached"] == cost(vit, "params") <= record["target"]
    assert next(limits, None) is None


def test_latency_has_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = timm.create_model("vit_tiny_patch16_224", **VIT | {"depth": 6})
    model = with_simulated_clock(dense, monkeypatch)
    full = latency([model], example_input(model, 1), 50)[0]["median"]
    (cycle,) = prune_cycles(model, plan_for("drawn", {"block": 1.0}, target={"latency_ms": 0.6 * full}), ())
    record = cycle.cost["latency_ms"]
    assert len(model.blocks) == 3
    assert record["target"] == pytest.approx(0.6 * full, abs=1e-6)
    assert 2.4 < record["p10"] < record["reached"] < record["p90"] < 3.6
    assert "why" in record  # a half of the dense model's milliseconds, 17 % below the target


def test_a_biased_search_by_latency_is_corrected() -> None:
    def masks_at(scalar: float) -> dict[str, Tensor]:
        return {"a": torch.arange(1000) >= int(scalar * 1000)}

    def read(masks: dict[str, Tensor]) -> float:  # decreases more slowly at first than the straight line
        share = 1 - float(masks["a"].double().mean())
        return 1 - 0.8 * share**1.5

    scalar, reading = refine_latency(masks_at, read, 0.6, 0.3)
    assert reading == read(masks_at(scalar))
    assert 0.6 * 0.98 <= reading <= 0.6
    assert refine_latency(masks_at, read, 0.6, 0.64) == (0.64, read(masks_at(0.64)))  # 0.5904: within the tolerance
    assert refine_latency(masks_at, read, 0.1, 0.3)[1] == pytest.approx(0.2, abs=0.01)  # unreachable: the nearest cost


@pytest.mark.parametrize(
    ("method", "settings", "reached", "why"),
    [
        (
            "drawn",
            {"sparsity": {"head": 1.0}},
            2,
            r"^0.89\d* \(.* MACs\) is [\d.]+% below the target: the last 2 units are removed together, of 2 groups of "
            r"kind head, and without that step it would be 1\.0000 \(.* MACs\)$",
        ),
        ("drawn", {"sparsity": {"head": 1.0}, "scope": "global"}, 1, None),
        (
            "drawn",
            {"sparsity": {"head": 1.0}, "rules": [{"match": ".*", "sparsity": 0.67}]},
            4,
            r"below the target: the rules alone remove enough$",
        ),
    ],
)
def test_a_target_miss_is_explained(method: str, settings: dict, reached: int, why: str | None) -> None:
    model, full = tiny("vit"), cost(tiny("vit"), "macs")
    heads = (
        cost(prune(model, "drawn", sparsity={"head": 0.34}, scope="layer").model, "macs") / full
    )  # one of three in both blocks
    limit = (1 + heads) / 2 + 0.001
    (cycle,) = prune_cycles(model, plan_for(method, settings.pop("sparsity"), target={"macs": limit}, **settings), ())
    assert sum(3 - block.attn.num_heads for block in model.blocks) == reached
    record = cycle.cost["macs"]
    assert record["reached"] == cost(model, "macs") / full
    if why is None:
        assert "why" not in record
        assert 0.98 <= record["reached"] / limit <= 1
    else:
        assert re.search(why, record["why"])
        assert record["reached"] / limit < 0.98


def test_a_target_miss_of_given_masks_is_explained(vit: nn.Module) -> None:
    groups, plan = find_groups(vit, ["ffn"]), plan_for("drawn", {"ffn": 1.0}, target={"macs": 0.7})
    masks = {group.name: torch.arange(192) < 96 for group in groups}
    (cycle,) = prune_cycles(vit, plan, (), masks)
    assert cycle.cost["macs"]["why"].endswith("% above the target: the masks were not selected for it")


def smallest(model: nn.Module, what: str) -> int:
    """Cost of the model with one unit in every group of the default kinds of the method `drawn`."""
    groups = find_groups(model, ["ffn", "attention"])
    masks = {g.name: (torch.arange(g.units) % g.shape[-1] == 0).view(g.shape) for g in groups}
    return cost(shrink(copy.deepcopy(model), groups, masks), what)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ({"macs": "lots"}, r"^prune.target.macs: 'lots' is no quantity; give a fraction, .*, got 'lots'$"),
        ({"macs": "600 MB"}, r"^prune.target.macs: '600 MB' is no quantity; .*, got '600 MB'$"),
        ({"macs": "-3M"}, r"^prune.target.macs: '-3M' is no quantity; .*, got '-3M'$"),
        ({"macs": "2G"}, r"^prune.target: 2G MACs is not less than the dense model has; {}$"),
        ({"macs": 10**9}, r"^prune.target: 1G MACs is not less than the dense model has; {}$"),
        ({"macs": "20K"}, r"^prune.target: 20K MACs cannot be reached, {}$"),
        ({"macs": 0.01}, r"^prune.target: 0.01 of the dense model cannot be reached, {}$"),
    ],
)
def test_an_unreachable_target_names_the_smallest_cost(vit: nn.Module, target: dict, why: str) -> None:
    full, least = cost(vit, "macs"), smallest(vit, "macs")
    has = rf"the smallest is {least / full:.4f} \({format_cost(least)} MACs\); the dense model "
    has += rf"has {format_cost(full)} MACs"
    with pytest.raises(BadInput, match=why.replace("{}", has)) as refused:
        prune(vit, "drawn", target=target)
    assert "\n" not in str(refused.value)


def test_unreachable_milliseconds_name_the_smallest_latency() -> None:
    for requested, why in (
        (1e5, "100K ms is not less than the dense model has; the smallest"),
        (1e-6, "cannot be reached"),
    ):
        with pytest.raises(BadInput, match=why):
            prune(tiny("vit").float(), "drawn", target={"latency_ms": requested})
    for requested, why in (
        (0, "Input should be greater than 0, got 0$"),
        (-1.0, "Input should be greater than 0, got -1.0$"),
        (float("nan"), "Input should be a finite number, got nan$"),
        (float("inf"), "Input should be a finite number, got inf$"),
    ):
        with pytest.raises(BadInput, match=rf"^prune.target.latency_ms: {why}"):
            prune(tiny("vit"), "drawn", target={"latency_ms": requested})
    with pytest.raises(BadInput, match=r"^prune.target.latency: Input should be less than 1, got 20$"):
        prune(tiny("vit"), "drawn", target={"latency": 20})


def test_fractional_steps_are_refused_with_an_absolute_target() -> None:
    schedule = Schedule(steps=[0.2, 0.5])
    with pytest.raises(BadInput, match=r"^prune.schedule.steps: are fractions but prune.target is absolute"):
        plan_for("drawn", None, cycles=2, schedule=schedule, target={"macs": "600M"})
    assert plan_for("drawn", None, cycles=2, schedule=schedule, target={"macs": "0.5"}).target == {"macs": 0.5}


@pytest.mark.parametrize(
    ("text", "number"),
    [("600M", 6e8), ("1.26 G", 1.26e9), ("12K", 12e3), ("600", 600), ("0.5", 0.5), (".5", 0.5), ("6e8", 6e8), (7, 7)],
)
def test_quantities_by_hand(text: str | float, number: float) -> None:
    assert number_of(text) == number


@pytest.mark.parametrize(
    "text", ["", "M", "6m", "1,2G", "-1K", "1 2", "nan", "inf", "0x10", "٣M", "5%", True, None, 1e999]
)
def test_invalid_quantities_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no quantity; give a fraction, a whole number, or one with K, M or G"):
        number_of(text)


def test_costs_are_formatted_with_four_digits() -> None:
    assert [format_cost(n) for n in (12.345678, 9999, 10_000, 572_416, 1_258_000_000, 999_999, 1_000_000)] == [
        "12.35",
        "9999",
        "10K",
        "572.4K",
        "1.258G",
        "1000K",
        "1M",
    ]
