"""A small PVTv2 on the digits through the stages: trained, scored, pruned in every kind, distilled by features."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models.pvt_v2 import Attention

import vitprune
from vitprune import data, models
from vitprune.config.params import Params
from vitprune.pipeline import stages
from vitprune.pipeline.project_template import new_params

ROOT = Path(__file__).parents[2]
TRAIN = {"epochs": 4, "batch_size": 32, "lr": 0.003, "augment": "none"}
SHAPE = {"embed_dims": [16, 32], "depths": [1, 1], "num_heads": [2, 4], "mlp_ratios": [4, 4], "sr_ratios": [2, 1]}
SPARSITY = {"residual": 0.25, "attention": 0.25, "ffn": 0.5}


def project_in(path: Path) -> Path:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    args = SHAPE | {"in_chans": 1, "num_classes": 10, "pretrained_cfg_overlay": {"input_size": [1, 32, 32]}}
    params["model"] = {"name": "pvt_v2_b0", "args": args}
    params["dense"]["train"] = TRAIN
    params["distill"] = {"kind": "features", "alpha": 20.0, "train": TRAIN}
    params["calibrate"]["size"], params["evaluate"]["latency_runs"], params["export"]["onnx"] = 100, 3, False
    params["prune"] |= {
        "method": "upvits-fisher",
        "kinds": list(SPARSITY),
        "sparsity": SPARSITY,
        "cycles": 1,
        "finetune": None,
    }
    path.mkdir()
    (path / "params.yaml").write_text(yaml.safe_dump(params))
    return path


def test_a_pvt_is_pruned_and_distilled_by_features(monkeypatch, tmp_path: Path) -> None:
    project = project_in(tmp_path / "project")
    for stage in stages.STAGES:
        monkeypatch.chdir(project)
        stages.run(stage, project)
    names = ("prune", "evaluate", "export")
    message = {name: json.loads((project / f"metrics/{name}.json").read_text()) for name in names}
    dense, taught = message["evaluate"]["dense"], message["evaluate"]["pruned"]
    assert dense["top1"] > 70
    assert taught["top1"] > message["prune"]["top1"] + 5
    assert message["evaluate"]["kept"]["macs"] < 0.55
    assert message["export"]["timm"] == {"loads_plain_timm": True, "max_abs_diff": 0.0}
    model, x = vitprune.load(project / "out/distill"), torch.randn(2, 1, 32, 32)
    assert {type(module) for module in model.modules() if isinstance(module, Attention)} == {Attention}
    plain = timm.create_model(f"local-dir:{project / 'out/export/timm'}", pretrained=True).eval()
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16_224"])
def test_digits_projects_with_models_of_any_and_of_a_fixed_input_size(name: str) -> None:
    text = new_params.render((ROOT / "params.yaml").read_text(), "digits", name, "channel-taylor", None)
    model = Params.model_validate(yaml.safe_load(text)).model
    assert data.example_input(models.create(model.name, model.args), 2).shape == (2, 1, 32, 32)
