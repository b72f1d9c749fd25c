"""The stages in sequence in a project directory, on the digits images, without DVC and Prefect."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import vitprune
from tests.support.digits_project import ORDER, project_in
from vitprune.config.params import read_yaml
from vitprune.pipeline import stages
from vitprune.runtime.files import sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finish(monkeypatch, tmp_path):
    def finish_project(name: str, until: str = "export", **prune: object) -> Path:
        project = project_in(tmp_path / name, **prune)
        for stage in ORDER[: ORDER.index(until) + 1]:
            monkeypatch.chdir(project)
            stages.run(stage, project)
        return project

    return finish_project


def weights_of(project: Path, stage: str = "distill") -> dict:
    return load_file(project / "out" / stage / "model.safetensors")


def test_the_same_seed_twice_gives_bit_identical_masks_and_weights(finish):
    one, two = (finish(name, until="distill") for name in ("one", "two"))
    result = sorted(path.relative_to(one) for path in (one / "out").rglob("*") if path.is_file())
    assert len(result) > 15
    assert [sha256(one / path) for path in result] == [sha256(two / path) for path in result]


def test_another_seed_gives_other_weights(finish):
    one, two = finish("one", until="dense"), project_in(finish("two", until="dense").parent / "three")
    params = yaml.safe_load((two / "params.yaml").read_text()) | {"seed": 1}
    (two / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("dataset", "dense"):
        stages.run(stage, two)
    assert sha256(one / "out/dense/model.safetensors") != sha256(two / "out/dense/model.safetensors")


def test_zeros_of_the_saved_weights_equal_the_last_masks(finish):
    project = finish("weights", method="dimap", sparsity=0.5)
    for stage in ("prune", "distill"):
        weights, masks = weights_of(project, stage), load_file(project / "out/cycles/03/masks.safetensors")
        assert len(masks) == 8
        for name, mask in masks.items():
            assert (weights[name] != 0).equal(mask), f"{stage}: {name}"
    removed, units = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert removed == units // 2
    kept = json.loads((project / "metrics/evaluate.json").read_text())["kept"]
    assert kept["params"] == 1.0
    assert kept["nonzero_params"] < 0.6


def test_zeros_are_cumulative_over_the_cycles_and_each_mask_has_its_digest(finish):
    project = finish("weights", until="prune", method="magnitude", sparsity=0.6)
    before = None
    for cycle in ("01", "02", "03"):
        folder = project / "out/cycles" / cycle
        masks = load_file(folder / "masks.safetensors")
        assert before is None or all(not (mask & ~before[name]).any() for name, mask in masks.items())
        assert json.loads((folder / "metrics.json").read_text())["masks_sha256"] == sha256(folder / "masks.safetensors")
        before = masks


def test_residual_channels_are_shrunk_and_never_zeroed(finish):
    project = finish("residual", method="channel-magnitude", kinds=["residual"], sparsity={"residual": 0.25}, cycles=2)
    weights = weights_of(project)
    assert weights["pos_embed"].shape[-1] == 36
    assert weights["blocks.0.mlp.fc2.weight"].abs().sum(dim=1).min() > 0
    assert not (weights["pos_embed"] == 0).all(dim=(0, 1)).any()
    export = json.loads((project / "metrics/export.json").read_text())["timm"]
    assert export == {"loads_plain_timm": False, "max_abs_diff": 0.0}


def test_up_vits_merges_heads_and_the_model_loads_in_plain_timm(finish):
    sparsity = {"ffn": 0.5, "attention": 0.5, "residual": 0.5}
    settings = {"kinds": list(sparsity), "sparsity": sparsity, "merge_heads_to": 1, "cycles": 1, "finetune": None}
    project = finish("upvits", method="upvits-literal", **settings)
    model = vitprune.load(project / "out/distill")
    assert [(b.attn.num_heads, b.attn.head_dim, b.mlp.fc1.out_features) for b in model.blocks] == [(1, 24, 96)] * 2
    assert json.loads((project / "metrics/export.json").read_text())["timm"]["loads_plain_timm"] is True
    table = pq.read_table(project / "out/mask/sparsity.parquet").to_pylist()
    assert {row["kind"]: row["kept"] for row in table} == {"ffn": 96, "attention": 24, "residual": 24}


def test_a_cycle_records_its_scores_and_the_correction(finish):
    one = {"cycles": 1, "finetune": None, "correct_norms": True}
    project = finish("settled", until="prune", method="upvits", sparsity=0.5, **one)
    settled = load_file(project / "out/mask/scores.safetensors")
    assert any(not torch.equal(settled[n], s) for n, s in load_file(project / "out/score/scores.safetensors").items())
    shown = pq.read_table(project / "out/cycles/01/scores.parquet").to_pylist()
    assert {row["group"]: row["max"] for row in shown} == {name: float(s.max()) for name, s in settled.items()}
    corrected = json.loads((project / "out/cycles/01/metrics.json").read_text())["corrected"]
    assert corrected["nats_after"] <= corrected["nats_before"]


def test_one_shot_two_of_four_keeps_two_of_every_four(finish):
    project = finish("nm", until="prune", method="n:m", sparsity=None, cycles=1)
    for mask in load_file(project / "out/cycles/01/masks.safetensors").values():
        assert (mask.view(-1, 4).sum(dim=1) == 2).all()


def test_permuted_channels_and_the_reconstruction_are_recorded(finish):
    settings = {"sparsity": None, "cycles": 1, "finetune": None, "reconstruct": {"passes": 2, "batch_size": 20}}
    project = finish("permuted", until="prune", method="obc", scope="2:4", **settings)
    orders = load_file(project / "out/score/orders.safetensors")
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    model, masks = vitprune.load(project / "out/prune"), load_file(project / "out/cycles/01/masks.safetensors")
    for name, mask in masks.items():
        assert (mask.view(-1, 4).sum(dim=1) == 2).all()
        assert not model.get_parameter(name)[~mask.view_as(model.get_parameter(name))].any()
    recorded = json.loads((project / "out/cycles/01/metrics.json").read_text())["reconstruction"]
    assert recorded["nats_after"] <= recorded["nats_before"]
    rows = [json.loads(line) for line in (project / "out/prune/history.jsonl").read_text().splitlines()]
    assert [row["cycle"] for row in rows] == [1, 1]
    assert recorded["nats_after"] == min(recorded["nats_before"], *(row["held_out_nats"] for row in rows))
    assert "held_out_nats" in (project / "plots/prune.csv").read_text().splitlines()[0]


@pytest.mark.real
def test_the_stages_on_real_images_and_weights(monkeypatch, tmp_path, real_data):
    params = read_yaml(ROOT / "recipes/deit_tiny_ffn_oneshot.yaml", "")
    params["dataset"] |= {"source": f"parquet:{real_data / 'imagenet-val-800.parquet'}", "eval_fraction": 0.1}
    params["dense"]["checkpoint"] = str(real_data / "deit_tiny_patch16_224.safetensors")
    params["calibrate"]["size"], params["evaluate"]["latency_runs"], params["export"]["onnx"] = 50, 2, False
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    for stage in ORDER:
        stages.run(stage, tmp_path)
    result = json.loads((tmp_path / "metrics/evaluate.json").read_text())
    assert result["dense"]["top1"] > 75
    assert 40 < result["pruned"]["top1"] < result["dense"]["top1"]
    assert result["dense"]["params"] == 5_717_416
    assert result["pruned"]["params"] == 5_717_416 - 12 * 192 * (192 + 192 + 1)
