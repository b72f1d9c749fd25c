"""Exported models give the logits of the original."""

from pathlib import Path

import numpy
import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import images, predict, random_masks, tiny
from tests.support.pruned_models import FAMILIES, all_cut
from vitprune import find_groups, load, prune, shrink
from vitprune.models.export import export_onnx, export_timm


def uneven(name: str) -> nn.Module:
    model = tiny(name, dtype=torch.float32)
    groups = find_groups(model, ["ffn", "attention"])
    masks = {}
    for index, group in enumerate(groups):
        masks |= random_masks([group], 1 + index % 4)
    return shrink(model, groups, masks)


def test_plain_timm_loads_a_uniform_model(tmp_path: Path) -> None:
    sparsity = {"ffn": 0.5, "attention": 0.25, "residual": 0.25}
    pruned = prune(tiny("vit", dtype=torch.float32), "channel-magnitude", sparsity=sparsity).model
    facts = export_timm(pruned, tmp_path, images(pruned))
    assert facts["loads_plain_timm"] is True
    assert facts["max_abs_diff"] < 1e-6
    assert predict(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), images(pruned)).shape == (3, 7)


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_plain_timm_does_not_load_an_uneven_model(name: str, tmp_path: Path) -> None:
    pruned = uneven(name)
    assert export_timm(pruned, tmp_path, images(pruned)) == {"loads_plain_timm": False, "max_abs_diff": 0.0}
    assert torch.equal(predict(load(tmp_path), images(pruned)), predict(pruned, images(pruned)))


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_gives_the_same_logits_for_any_batch_size(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    pruned = all_cut(family)
    path = tmp_path / "deep" / "model.onnx"
    facts = export_onnx(pruned, path, images(pruned, 2))
    assert facts["bytes"] == path.stat().st_size > 1000
    assert facts["max_abs_diff"] < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for number in (1, 5):
        x = images(pruned, number, seed=number)
        (logits,) = session.run(None, {"images": x.numpy()})
        expected = predict(pruned, x).numpy()
        assert abs(expected).max() > 0.1
        numpy.testing.assert_allclose(logits, expected, atol=1e-4)
