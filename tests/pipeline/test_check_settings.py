"""Settings that do not fit the method or the model are refused before the first stage."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.pipeline.check_settings import check_settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("section", "changes", "why"),
    [
        ("prune", {"method": "chanel-taylor"}, r"unknown; did you mean channel-taylor\?; use one of"),
        ("prune", {"sparsity": None, "target": {"macs": 1.5}}, "^prune.target: 1.5 MACs cannot be reached, the"),
        ("prune", {"sparsity": None, "target": {"params": "90G"}}, "^prune.target: 90G parameters is not less than"),
        ("prune", {"rules": [{"match": "block\\.0", "ignore": True}]}, r"^prune.rules.0: 'block.*' matches the full"),
        ("prune", {"sparsity": {"block": 0.5}}, "prune.sparsity.block: method channel-taylor prunes only"),
        ("prune", {"finetune": {"epochs": 1, "lr": 0.1, "optimizer": "adamww"}}, "prune.finetune.optimizer: 'adamww'"),
        ("model", {"name": "vit_tiny_patch16_242"}, r"model.name .*; did you mean vit_tiny_patch16_224\?$"),
        ("model", {"args": {"img_sise": 32}}, "model.name 'vit_tiny_patch16_224': timm cannot create it"),
        ("dense", {"start": "checkpoint", "checkpoint": "none.safetensors"}, "none.safetensors: no such file"),
        ("dense", {"train": None}, "dense.train: start is train, so give epochs"),
    ],
)  # fmt: skip
def test_settings_that_cannot_run_are_refused(section: str, changes: dict[str, Any], why: str) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw[section] |= changes
    with pytest.raises(BadInput, match=why):
        check_settings(Params.model_validate(raw))


def test_the_demo_and_a_latency_target_pass() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    check_settings(Params.model_validate(raw))
    raw["prune"] |= {"sparsity": None, "target": {"latency": 0.5}}
    check_settings(Params.model_validate(raw))
