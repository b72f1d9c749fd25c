"""Gates, the paired test behind them, and the comparison with a champion on real files."""

import math
from pathlib import Path

import pytest

from vitprune import models
from vitprune.errors import BadInput
from vitprune.evaluation.paired_test import McNemarTable
from vitprune.pipeline import stages
from vitprune.pipeline.promotion import PromotionGates, compare_with_champion, load_gates, verdict
from vitprune.runtime.files import sha256


def holding(
    paired: McNemarTable, gates: PromotionGates, speedup: float | None = 1.5, size: int = 1000
) -> dict[str, bool]:
    return {gate.name: gate.holds for gate in verdict(paired, gates, speedup, size, "champion")}


def test_mcnemar_test_equals_a_binomial_tail() -> None:
    assert McNemarTable(90, 5, 1, 4).p_worse == 7 / 64  # (1 + 6) / 2^6
    assert McNemarTable(90, 0, 0, 10).p_worse == 1.0
    assert McNemarTable(90, 1, 5, 4).p_worse == 63 / 64
    large = McNemarTable(40_000, 3_000, 2_800, 4_200)
    z = (2_800 + 0.5 - 2_900) / math.sqrt(5_800 / 4)
    assert large.p_worse == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), rel=0.01)


def test_each_gate_passes_up_to_its_limit() -> None:
    worse = McNemarTable(90, 5, 1, 4)  # 4 points, p = 0.109
    assert holding(worse, PromotionGates(max_accuracy_loss=4.0)) == {"accuracy": True, "paired test": True}
    assert holding(worse, PromotionGates(max_accuracy_loss=3.9)) == {"accuracy": False, "paired test": True}
    assert holding(worse, PromotionGates(max_accuracy_loss=4.0, alpha=0.11)) == {"accuracy": True, "paired test": False}
    equal = McNemarTable(90, 1, 1, 8)
    assert holding(equal, PromotionGates(max_accuracy_loss=0.0, alpha=None, min_speedup=1.5, max_size="1K")) == {
        "accuracy": True, "speed": True, "size": True,
    }  # fmt: skip
    assert holding(equal, PromotionGates(alpha=None, min_speedup=1.51, max_size=999)) == {
        "accuracy": True, "speed": False, "size": False,
    }  # fmt: skip
    assert not holding(equal, PromotionGates(min_speedup=0.1), speedup=None)["speed"]


@pytest.mark.parametrize("text", ["max_loss: 1", "alpha: 2", "max_size: big", "max_size: 0", "[1", "min_speedup: -1"])
def test_invalid_gates_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"gates\.yaml: "):
        load_gates(tmp_path / "gates.yaml")


def test_default_gates_without_a_file(tmp_path: Path) -> None:
    assert load_gates(tmp_path / "gates.yaml") == PromotionGates()


@pytest.mark.pipeline
def test_champion_and_challenger_are_compared_on_the_same_images(
    finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = finished_project
    monkeypatch.chdir(project)
    params = stages.enter(project)
    itself = compare_with_champion(params, project / "out/distill", PromotionGates())
    assert (itself["lost"], itself["won"], itself["p_worse"], itself["passed"]) == (0, 0, 1.0, True)
    assert itself["challenger_sha256"] == itself["champion_sha256"] == sha256(project / "out/distill/model.safetensors")
    gates = PromotionGates(max_accuracy_loss=100, alpha=None)
    dense = compare_with_champion(params, None, gates)
    as_champion = compare_with_champion(params, project / "out/dense", gates)
    assert [dense[key] for key in ("lost", "won", "images")] == [as_champion[key] for key in ("lost", "won", "images")]
    other = models.create("vit_tiny_patch16_224", {**params.model.args, "num_classes": 3})
    models.save(other, tmp_path / "other")
    with pytest.raises(BadInput, match="num_classes"):
        compare_with_champion(params, tmp_path / "other", PromotionGates())
