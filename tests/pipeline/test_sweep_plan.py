"""Runs and settings of a sweep file, and refused sweep files."""

from pathlib import Path

import pytest
import yaml

from vitprune import BadInput
from vitprune.pipeline.sweep_plan import Run, read_sweep, runs_of

ROOT = Path(__file__).parents[2]


def runs(tmp_path: Path, **given: object) -> list[Run]:
    """Return the runs of a sweep with the demo's settings."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return runs_of(read_sweep(tmp_path / "sweep.yaml"), ROOT / "params.yaml")


def test_every_method_at_every_target(tmp_path: Path) -> None:
    result = runs(
        tmp_path,
        methods=["channel-taylor", "unit-obs"],
        targets=[0.5, {"macs": 0.4}, {"params": "150K"}, {"ffn": 0.6, "attention": 0.6}],
    )
    assert [run.name for run in result] == [
        f"{method}-{target}"
        for method in ("channel-taylor", "unit-obs")
        for target in ("sparsity-0.5", "macs-0.4", "params-150k", "ffn-0.6-attention-0.6")
    ]
    assert [run.target for run in result[:3]] == ["sparsity 0.5", "macs 0.4", "params 150K"]
    demo = yaml.safe_load((ROOT / "params.yaml").read_text())
    expected = demo["prune"] | {"method": "unit-obs", "sparsity": None, "target": {"macs": 0.4}}
    assert result[5].params == demo | {"prune": expected}
    assert result[0].params["prune"]["sparsity"] == 0.5
    assert result[3].params["prune"]["sparsity"] == {"ffn": 0.6, "attention": 0.6}


def test_settings_for_all_and_for_one_method(tmp_path: Path) -> None:
    result = runs(
        tmp_path,
        methods={"channel-taylor": None, "lamp": {"cycles": 2}},
        targets=[0.25],
        params={"prune": {"cycles": 1, "finetune": None}, "distill": {"train": None}, "seed": 3},
    )
    assert [run.params["prune"]["cycles"] for run in result] == [1, 2]
    assert {run.params["prune"]["finetune"] for run in result} == {None}
    assert {run.params["seed"] for run in result} == {3}
    before = yaml.safe_load((ROOT / "params.yaml").read_text())["distill"]
    assert result[0].params["distill"] == before | {"train": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["magic"], "targets": [0.5]}, r"^method 'magic': unknown; use one of random"),
        ({"methods": [], "targets": [0.5]}, r"sweep.yaml: methods: .*at least 1 item"),
        ({"methods": ["lamp"], "targets": []}, r"sweep.yaml: targets: .*at least 1 item"),
        ({"methods": ["lamp"], "targets": [1.5]}, r"sweep.yaml: targets.0: .*less than 1, got 1.5"),
        ({"methods": ["lamp"], "targets": [{"flops": 0.5}]}, r"sweep.yaml: targets.0"),
        (
            {"methods": ["lamp"], "target": [0.5]},
            r"sweep.yaml: target: unknown key|sweep.yaml: targets: Field required",
        ),
        ({"methods": ["lamp"], "targets": [0.5], "against": "time"}, r"sweep.yaml: against: "),
        ({"methods": ["lamp", "lamp"], "targets": [0.5]}, r"^methods: lamp, lamp names one twice"),
        ({"methods": ["lamp"], "targets": [0.5, 0.5]}, r"^targets: lamp-sparsity-0.5 is there twice"),
        (
            {"methods": {"lamp": {"sparsity": 0.1}}, "targets": [0.5]},
            r"^methods.lamp.sparsity: is set by the sweep itself",
        ),
        (
            {"methods": {"lamp": {"cycle": 1}}, "targets": [0.5]},
            r"^run lamp-sparsity-0.5: params.yaml: prune.cycle: unkn",
        ),
        (
            {"methods": ["lamp"], "targets": [{"latency": 0.5}]},
            r"^run lamp-latency-0.5: .*zeroed single weights do not run faster; use params or macs",
        ),
        ({"methods": ["lamp"], "targets": [{"ffn": 0.5}]}, r"^run lamp-ffn-0.5: .*method lamp prunes only weight"),
        (
            {"methods": ["unit-obs"], "targets": [{"params": "90M"}]},
            r"^run unit-obs-params-90m: .*is not less than the den",
        ),
        ({"methods": ["unit-obs"], "targets": [{"macs": 0.01}]}, r"^run unit-obs-macs-0.01: .*cannot be reached"),
        ({"methods": ["n:m"], "targets": [0.3]}, r"^run n-m-sparsity-0.3: .*removes 0.5"),
    ],
)
def test_invalid_sweeps_are_refused_before_the_first_run(tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        runs(tmp_path, **given)
    assert "\n" not in str(error.value)


def test_a_missing_sweep_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none.yaml: no such file; give a file with methods and targets"):
        read_sweep(tmp_path / "none.yaml")
