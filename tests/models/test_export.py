"""Exported models give the logits of the original."""

import re
from pathlib import Path

import numpy
import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import SMALL, images, predict, random_masks, redrawn, tiny
from tests.support.pruned_models import FAMILIES, all_cut
from vitprune import BadInput, find_groups, load, prune, shrink
from vitprune.data import example_input
from vitprune.models.export import ExportError, export_onnx, export_timm


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
    assert not re.search(rb'File "|/[\w.-]+/[\w./-]+\.py', path.read_bytes())  # no path of this machine
    assert facts["max_abs_diff"] < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for number in (1, 5):
        x = images(pruned, number, seed=number)
        (logits,) = session.run(None, {"images": x.numpy()})
        expected = predict(pruned, x).numpy()
        assert abs(expected).max() > 0.1
        numpy.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "maxvit_pico_rw_256"])
def test_attention_with_a_position_bias_is_exported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model = redrawn(timm.create_model(name, **{"num_classes": 7} | SMALL[name]), 0)
    export_onnx(model, tmp_path / "model.onnx", example_input(model, 2))
    assert all(vars(module).get("fused_attn", True) for module in model.modules())


def test_half_precision_the_name_of_the_batch_axis_and_the_opset(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
    model = torch.compile(tiny("vit", dtype=torch.bfloat16), backend="eager")
    export_onnx(model, str(tmp_path / "model.onnx"), torch.ones(1, 3, 32, 32), opset=18)
    written = onnx.load(tmp_path / "model.onnx")
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in written.graph.input] == ["batch"]
    assert {tensor.data_type for tensor in written.graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    assert written.opset_import[0].version == 18
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(BadInput, match=r"^export.opset 99: use a number from 18 to "):
        export_onnx(model, tmp_path / "model.onnx", torch.ones(1, 3, 32, 32), opset=99)


def test_a_model_that_cannot_be_exported_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model = tiny("vit", dtype=torch.float32)
    model.head.register_forward_hook(lambda module, inputs, output: output if output.sum() > 0 else -output)
    with pytest.raises(ExportError, match=r"^export.onnx: torch cannot export this model \(") as error:
        export_onnx(model, tmp_path / "model.onnx", images(model, 2))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
