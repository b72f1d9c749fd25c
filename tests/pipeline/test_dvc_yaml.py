"""dvc.yaml against what it speaks of: every parameter exists, every code dependency is a file."""

from pathlib import Path

import pytest
import yaml

from vitprune.config.params import load
from vitprune.pipeline import stages
from vitprune.pruning.prune import plan_for

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SETTINGS = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]


def has(params: dict, dotted: str) -> bool:
    *sections, leaf = dotted.split(".")
    for section in sections:
        params = params[section]
    return leaf in params


def test_the_stages_are_those_of_the_command_line_in_order():
    assert list(STAGES) == [*stages.STAGES, "report"]
    assert all(stage["cmd"] == f"vitprune {name}" for name, stage in STAGES.items())


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_name_every_parameter_that_a_stage_depends_on(path):
    params = yaml.safe_load(path.read_text())
    named = {dotted for stage in STAGES.values() for dotted in stage.get("params", [])}
    assert [dotted for dotted in sorted(named) if not has(params, dotted)] == []


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_are_valid(path):
    prune = load(path).prune
    sparsity = dict.fromkeys(prune.kinds, prune.sparsity) if prune.kinds else prune.sparsity
    plan_for(prune.method, sparsity, prune.scope, prune.heads, prune.cycles, prune.schedule)


def test_code_dependencies_are_there():
    code = {dep for stage in STAGES.values() for dep in stage["deps"] if dep.startswith("vitprune/")}
    assert len(code) > 15
    assert [dep for dep in code if not (ROOT / dep).exists()] == []


def test_a_change_of_sparsity_runs_from_mask_on_only():
    again = [name for name, stage in STAGES.items() if {"prune", "prune.sparsity"} & set(stage.get("params", []))]
    assert again[0] == "mask"
    assert not {"dataset", "dense", "calibrate", "score"} & set(again)
