"""Pruning of a rotated residual stream through the Python API: save, load, plain timm, ONNX, widths, refusals."""

from pathlib import Path

import pytest
import timm
import torch

from tests.support.model_zoo import batches, images, predict, tiny
from vitprune import BadInput, PruneConfig, TrainConfig, gradual_prune, load, plan_for, prune, save
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.obs.stream import stream_basis
from vitprune.models.export import export_onnx
from vitprune.pipeline.check_settings import check_plan


@pytest.mark.parametrize("name", ["vit", "distilled", "extra"])
def test_one_channel_is_removed_without_error(name: str) -> None:
    model = tiny(name)
    settings = {"sparsity": {"residual": 1 / 48}, "calibration": batches(model, 4, 6), "rotate_residual": True}
    result = prune(model, "unit-obs", **settings)
    assert result.masks["residual"].tolist() == [True] * 47 + [False]
    inputs = images(model)
    torch.testing.assert_close(predict(result.model, inputs), predict(model, inputs), rtol=0, atol=1e-3)


def test_the_pruned_model_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model = tiny("extra", dtype=torch.float32)
    sparsity = {"residual": 0.3, "ffn": 0.5}
    settings = {"calibration": batches(model, 3, 6), "rotate_residual": True, "correct_norms": True}
    result = prune(model, "unit-obs", sparsity=sparsity, round_to={"residual": 8}, **settings).model
    assert result.embed_dim == 32
    save(result, tmp_path / "saved")
    loaded, inputs = load(tmp_path / "saved"), images(model)
    torch.testing.assert_close(predict(loaded, inputs), predict(result, inputs), rtol=0, atol=0)
    assert export_onnx(loaded, tmp_path / "model.onnx", inputs)["max_abs_diff"] < 1e-4


def test_plain_timm_loads_a_model_of_equal_blocks(tmp_path: Path) -> None:
    model = tiny("vit", dtype=torch.float32)
    settings = {"calibration": batches(model), "rotate_residual": True, "round_to": {"residual": 24}}
    sparsity = {"residual": 0.5, "attention": 0.5}
    result = prune(model, "upvits-fisher", sparsity=sparsity, **settings).model
    save(result, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(predict(plain, images(model)), predict(result, images(model)), rtol=0, atol=0)


def test_later_cycles_prune_the_rotated_model() -> None:
    model = tiny("vit", dtype=torch.float32)
    settings = {"sparsity": {"residual": 0.5}, "cycles": 2, "rotate_residual": True}
    config = PruneConfig(method="unit-obs", finetune=TrainConfig(epochs=1, lr=1e-3), **settings)
    result = gradual_prune(model, config, batches(model), calibration=batches(model))
    assert result.model.embed_dim == int(result.masks["residual"].sum()) == 24


def test_a_rotation_without_residual_channels_or_of_another_model_is_refused() -> None:
    with pytest.raises(BadInput, match=r"prune.rotate_residual: needs kind residual; set it to false"):
        plan_for(PruneConfig(method="unit-obs", sparsity=0.5, rotate_residual=True))
    model = tiny("swin")
    settings = {"calibration": batches(model), "rotate_residual": True}
    with pytest.raises(BadInput, match=r"SwinTransformer: is no VisionTransformer"):
        prune(model, "upvits-fisher", sparsity={"residual": 0.5}, **settings)
    plan = plan_for(PruneConfig(method="upvits-fisher", sparsity={"residual": 0.5}, rotate_residual=True))
    with pytest.raises(BadInput, match=r"SwinTransformer: is no VisionTransformer"):
        check_plan(model, plan)
    other = timm.create_model("resnet10t", num_classes=7)  # without an embed_dim
    with pytest.raises(BadInput, match=r"ResNet: is no VisionTransformer"):
        stream_basis(other, [(torch.zeros(1, 3, 64, 64), torch.zeros(1))], DEFAULT_CONTEXT)
