"""The method `auto` chooses another one; a budget limits the passes of the reconstruction."""

import pytest
import torch
from torch import nn

from tests.support.model_zoo import batches, state, tiny
from tests.support.other_models import make_model
from vitprune import BadInput, ReconstructConfig, prune
from vitprune.config.quantity import seconds_of
from vitprune.pruning.auto import auto_method, has_exact_scores
from vitprune.pruning.reconstruct import MAX_PASSES


@pytest.mark.parametrize(
    ("kinds", "whole_units", "method"),
    [
        ((), True, "unit-obs"),
        ((), False, "obc"),
        (["weight"], True, "obc"),
        (["ffn", "attention"], False, "unit-obs"),
        (["head"], True, "unit-obs"),
        (["residual", "ffn"], True, "upvits"),
        (["block"], False, "upvits-blocks"),
    ],
)
def test_kinds_determine_the_method(kinds: list[str], whole_units: bool, method: str) -> None:
    assert auto_method(kinds, whole_units) == method


def test_residual_channels_of_a_rotated_stream_are_pruned_by_unit_obs() -> None:
    assert auto_method(["residual", "ffn"], False, rotated=True) == "unit-obs"


def test_kinds_without_a_common_method_are_refused() -> None:
    with pytest.raises(BadInput, match=r"^method auto: no method prunes block, ffn together; prune them one after"):
        prune(tiny("vit"), "auto", sparsity={"ffn": 0.5, "block": 0.5})


@pytest.mark.parametrize(
    ("settings", "method"), [({"scope": "2:4"}, "obc"), ({"target": {"macs": 0.7}}, "unit-obs")], ids=["2:4", "MACs"]
)
def test_auto_gives_the_model_of_its_method_and_passes(settings: dict, method: str) -> None:
    model = tiny("vit", dtype=torch.float32)
    data = batches(model, 3, 6)
    result = prune(model, "auto", calibration=data, budget="1h", **settings)
    assert f"method: {method}" in str(result)
    same = ReconstructConfig(passes=int(result.reconstruction["passes"]))
    again = prune(model, method, calibration=data, reconstruct=same, **settings)
    assert again.chosen_method == ""
    assert equal(again.model, result.model)


def test_a_small_budget_allows_no_pass_and_a_large_one_the_maximum() -> None:
    model = tiny("vit", dtype=torch.float32)
    data = batches(model, 2, 6)
    passes = [
        prune(model, "magnitude", sparsity=0.5, calibration=data, reconstruct=True, budget=budget).reconstruction
        for budget in (1e-3, "1h")
    ]
    assert [facts["passes"] for facts in passes] == [0, MAX_PASSES]
    assert passes[0]["nats_after"] == passes[0]["nats_before"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5 min", 90), ("2h", 7200), (20, 20)])
def test_durations_are_parsed(text: str | float, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("budget", ["3 minutes", "min", "", 0, -1, float("nan"), True, "0s"])
def test_a_budget_that_is_not_a_duration_is_refused(budget: object) -> None:
    model = tiny("vit")
    with pytest.raises(BadInput, match=r"^budget: .* is no duration; give seconds, or a number with s, min or h"):
        prune(model, "auto", sparsity=0.5, calibration=batches(model, 1, 6), budget=budget)  # type: ignore[arg-type]


def test_a_budget_without_a_reconstruction_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^budget: is for the reconstruction; give reconstruct=True$"):
        prune(tiny("vit"), "magnitude", sparsity=0.5, budget="1min")


def equal(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = state(first), state(second)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_residual_channels_of_models_of_other_libraries_are_scored_to_second_order() -> None:
    model = make_model("vit")
    result = prune(model, "auto", sparsity={"residual": 0.25}, calibration=[torch.randn(12, 3, 64, 64)], budget="1s")
    assert result.chosen_method == "upvits-fisher"
    assert result.sparsity == {"residual": 0.25}
    assert [has_exact_scores(one) for one in (model, tiny("swin"))] == [False, True]
