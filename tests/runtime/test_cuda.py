"""On a CUDA device: every method prunes as on the CPU, and models are trained, measured, saved and exported there.

Skipped without a device. VITPRUNE_TEST_DEVICE=cpu runs the same cases on the CPU.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import vitprune
from tests.support.model_zoo import batches, redrawn, same_state, state, tiny
from vitprune import METHODS, PruneConfig, ReconstructConfig, ScoreConfig, TrainConfig
from vitprune.config.allocation_config import AllocationConfig

DEVICE = torch.device(os.environ.get("VITPRUNE_TEST_DEVICE", "cuda"))
HAS_DEVICE = DEVICE.type != "cuda" or torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device")]

SETTINGS: dict[str, dict[str, object]] = {
    "2:4 with permuted channels": {"method": "obc", "scope": "2:4", "sparsity": None},
    "2:4 by elimination": {
        "method": "obc",
        "scope": "2:4",
        "sparsity": None,
        "config": ScoreConfig(nm_search="greedy"),
    },
    "rotated residual stream": {"method": "unit-obs", "sparsity": {"residual": 0.25}, "rotate_residual": True},
    "corrected norms": {"method": "unit-obs", "correct_norms": True},
    "target in MACs": {"method": "unit-obs", "sparsity": None, "target": {"macs": 0.6}},
    "searched widths": {
        "method": "unit-obs",
        "sparsity": None,
        "target": {"macs": 0.6},
        "allocation": AllocationConfig(evaluations=12),
    },
    "fewer heads": {"method": "upvits-fisher", "merge_heads_to": 1},
    "blocks": {"method": "upvits-blocks", "sparsity": {"block": 0.5}},
}


def images_of(model: nn.Module, number: int = 4) -> list[tuple[Tensor, Tensor]]:
    return batches(model, number, 5)


def on(device: torch.device, name: str, settings: Mapping[str, object], dtype: torch.dtype) -> vitprune.PruneResult:
    model = tiny(name, dtype=dtype)
    data = images_of(model)
    return vitprune.prune(model.to(device), **{"sparsity": 0.5, "calibration": data} | dict(settings))


def assert_as_on_the_cpu(name: str, settings: Mapping[str, object], dtype: torch.dtype = torch.float64) -> None:
    expected, result = on(torch.device("cpu"), name, settings, dtype), on(DEVICE, name, settings, dtype)
    assert {parameter.device.type for parameter in result.model.parameters()} == {DEVICE.type}
    assert list(result.masks) == list(expected.masks)
    for group, mask in expected.masks.items():
        assert torch.equal(result.masks[group].cpu(), mask), group
    for key, value in expected.model.state_dict().items():  # row_solve.EXCESS permits 1e-4 of a change of a weight
        torch.testing.assert_close(result.model.state_dict()[key].cpu(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_prunes_as_on_the_cpu(method: str) -> None:
    assert_as_on_the_cpu("vit", {"method": method, "sparsity": {"block": 0.5} if method == "upvits-blocks" else 0.5})


@pytest.mark.parametrize("name", ["swin", "pvt", "extra"])
@pytest.mark.parametrize("method", ["unit-obs", "obc", "upvits-fisher"])
def test_other_models_are_pruned_as_on_the_cpu(name: str, method: str) -> None:
    assert_as_on_the_cpu(name, {"method": method})


@pytest.mark.parametrize("settings", list(SETTINGS))
def test_settings_prune_as_on_the_cpu(settings: str) -> None:
    assert_as_on_the_cpu("vit", SETTINGS[settings])


def test_token_merging_prunes_as_on_the_cpu() -> None:
    assert_as_on_the_cpu("vit", {"method": "unit-obs", "sparsity": None, "target": {"macs": 0.6}, "merge_tokens": 2})


def test_a_time_budget_reaches_the_target() -> None:
    result = on(
        DEVICE, "vit", {"method": "auto", "sparsity": None, "target": {"macs": 0.6}, "budget": 3}, torch.float32
    )
    assert result.chosen_method
    assert result.after.macs <= 0.6 * result.before.macs


def test_calibration_images_on_the_device() -> None:
    model, data = tiny("vit"), images_of(tiny("vit"))
    there = [(images.to(DEVICE), labels.to(DEVICE)) for images, labels in data]
    results = [
        vitprune.prune(model.to(DEVICE), "unit-obs", sparsity=0.5, calibration=calibration, reconstruct=True)
        for calibration in (data, there)
    ]
    assert same_state(results[0].model, state(results[1].model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_returned(dtype: torch.dtype) -> None:
    model = tiny("vit", dtype=torch.float32).to(DEVICE, dtype)
    data = [(images.float(), labels) for images, labels in images_of(tiny("vit"))]
    result = vitprune.prune(model, "unit-obs", sparsity=0.5, calibration=data)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    assert torch.isfinite(result.model(data[0][0].to(DEVICE, dtype))).all()


def test_reconstruction_is_bit_identical_and_lowers_the_divergence() -> None:
    def run() -> vitprune.PruneResult:
        settings = {
            "method": "unit-obs",
            "reconstruct": ReconstructConfig(passes=3, mirror=False, lr=1e-3, batch_size=4, holdout=5),
        }
        return on(DEVICE, "vit", settings, torch.float32)

    one, two = run(), run()
    assert one.reconstruction["nats_after"] < one.reconstruction["nats_before"]
    assert same_state(one.model, state(two.model))


def test_training_keeps_zeros_and_is_bit_identical() -> None:
    states = []
    for _ in range(2):
        result = on(DEVICE, "vit", {"method": "magnitude"}, torch.float32)
        zeros = {name: value == 0 for name, value in result.model.named_parameters() if value.ndim == 2}
        data = [(images.float(), labels) for images, labels in images_of(tiny("vit"))]
        teacher = tiny("vit", dtype=torch.float32).to(DEVICE)
        recipe = TrainConfig(epochs=2, lr=1e-3)
        rows = vitprune.finetune(result.model, data, recipe, teacher=teacher)
        assert len(rows) == 2
        for name, parameter in result.model.named_parameters():
            assert parameter.ndim != 2 or bool((parameter[zeros[name]] == 0).all()), name
        states.append(state(result.model))
    assert same_state(result.model, states[0])


def test_gradual_pruning_runs_on_the_device() -> None:
    model = tiny("vit", dtype=torch.float32).to(DEVICE)
    data = [(images.float(), labels) for images, labels in images_of(model)]
    config = PruneConfig(
        method="unit-obs", sparsity=0.5, cycles=2, schedule={"shape": "linear"}, finetune=TrainConfig(epochs=1, lr=1e-4)
    )
    result = vitprune.gradual_prune(model, config, data, calibration=data)
    assert result.after.params < result.before.params


def test_a_pruned_model_is_measured_saved_and_exported(tmp_path: Path) -> None:
    result = on(DEVICE, "vit", {"method": "unit-obs"}, torch.float32)
    data = [(images.float(), labels) for images, labels in images_of(tiny("vit"))]
    there, here = vitprune.evaluate(result.model, data), vitprune.evaluate(copy.deepcopy(result.model).cpu(), data)
    assert there == here
    assert vitprune.latency([result.model], data[0][0], 3)[0]["median"] > 0
    vitprune.save(result.model, tmp_path / "model")
    loaded = vitprune.load(tmp_path / "model")
    assert same_state(loaded, {name: value.cpu() for name, value in result.model.state_dict().items()})
    vitprune.export_onnx(result.model, tmp_path / "model.onnx", data[0][0])
    assert {parameter.device.type for parameter in result.model.parameters()} == {DEVICE.type}


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin"])
def test_transformers_models_are_pruned_and_saved(name: str, tmp_path: Path) -> None:
    size = {"image_size": 56, "patch_size": 14}
    widths = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    stages = {"image_size": 56, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
    sizes = stages | {"window_size": 7} if name == "swin" else widths | size
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **sizes)).eval().to(DEVICE)
    data = [torch.randn(4, 3, 56, 56) for _ in range(2)]
    result = vitprune.prune(model, "unit-obs", sparsity=0.5, calibration=data)
    assert result.after.params < result.before.params
    vitprune.save(result.model, tmp_path)
    assert same_state(vitprune.load(tmp_path), {key: value.cpu() for key, value in result.model.state_dict().items()})


def test_groups_are_proven() -> None:
    model = redrawn(tiny("vit"), 3).to(DEVICE)
    assert vitprune.check(model)
