"""INT8 quantization by onnxruntime: exact zeros, similar predictions, results of the export stage."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import timm
import torch
import yaml
from torch import nn

from tests.support.digits_project import project_in
from tests.support.model_zoo import ZOO, images, predict, redrawn
from vitprune import find_groups, models, prune
from vitprune.config.params import Export
from vitprune.errors import BadInput
from vitprune.pipeline import stages

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")

from vitprune.models.export import export_onnx  # noqa: E402
from vitprune.models.int8 import IMAGES, CalibrationBatches, compare_onnx, count_zeros, quantize_int8  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small ViT with half of its weights zero and one output channel all zero, as an ONNX file and as a model."""
    name, args = ZOO["vit"]
    model = prune(redrawn(timm.create_model(name, **args), 0), "magnitude", sparsity=0.5).model
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[3] = 0
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path, images(model, 2))
    return path, model


@pytest.mark.parametrize(("calibration", "bits"), [("percentile", 7), ("minmax", 8), ("entropy", 7)])
def test_int8_keeps_zeros_and_predictions(exported: tuple[Path, nn.Module], calibration, bits, tmp_path: Path) -> None:
    source, model = exported
    facts = quantize_int8(source, tmp_path / "int8.onnx", images(model, 40), calibration, bits)
    mine = [model.get_parameter(group.name) for group in find_groups(model, ["weight"])]
    assert facts["zeros"] == sum(int((weight == 0).sum()) for weight in mine)
    assert facts["weights"] == sum(w.numel() for w in mine) + model.head.weight.numel() + 48 * 3 * 8 * 8
    assert facts["zeros"] <= facts["int8_zeros"] < 0.6 * facts["weights"]
    assert (facts["calibration"], facts["images"]) == (calibration, 40)
    assert facts["bytes"] == (tmp_path / "int8.onnx").stat().st_size < 0.6 * source.stat().st_size
    x = images(model, 8, seed=5)
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"images": x.numpy()})
    exact = predict(model, x).numpy()
    assert numpy.abs(result - exact).mean() < 0.1 * exact.std()


def test_only_products_with_weights_are_quantized(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    source, model = exported
    quantize_int8(source, tmp_path / "int8.onnx", images(model, 16), "minmax")
    nodes = onnx.load(str(tmp_path / "int8.onnx")).graph.node
    from_int8 = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    products = [from_int8.issuperset(node.input[:2]) for node in nodes if node.op_type == "MatMul"]
    in_float = sum(not from_int8.intersection(node.input) for node in nodes if node.op_type == "MatMul")
    assert in_float == 2 * len(model.blocks)  # queries and keys; attention and values
    assert sum(products) == len(products) - in_float > 0


def test_compare_onnx_by_hand(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    source, model = exported
    quantize_int8(source, tmp_path / "int8.onnx", images(model, 40))
    x = images(model, 20, seed=7)
    labels = predict(model, x).argmax(1)
    labels[:5] = (labels[:5] + 1) % 7
    result = compare_onnx([source, tmp_path / "int8.onnx"], list(zip(x.split(8), labels.split(8), strict=True)))
    assert result["model_top1"] == 75
    assert result["int8_agrees"] >= 80
    assert result["model_top1"] - (100 - result["int8_agrees"]) <= result["int8_top1"]


def test_a_zero_that_becomes_nonzero_is_refused(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    source, model = exported
    path = tmp_path / "int8.onnx"
    quantize_int8(source, path, images(model, 16), "minmax")
    graph = onnx.load(str(path))
    weight = next(t for t in graph.graph.initializer if t.name.endswith("_quantized") and t.dims[-1] == 48)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) | 1, weight.name))
    onnx.save(graph, str(path))
    with pytest.raises(BadInput, match="became nonzero in quantization; do not use it"):
        count_zeros(source, path)


def test_calibration_reads_small_batches_of_the_first_images() -> None:
    reader = CalibrationBatches(torch.arange(200.0).view(-1, 1, 1, 1))
    assert (len(reader), IMAGES) == (8, 128)
    reader.set_range(2, 4)
    read = [reader.get_next() for _ in range(3)]
    assert [batch["images"].ravel()[0] for batch in read[:2]] == [32, 48]
    assert read[2] is None


def test_an_unknown_calibration_and_int8_without_onnx_are_refused(
    exported: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    source, model = exported
    with pytest.raises(BadInput, match=r"^calibration 'best': unknown; use one of minmax, percentile, entropy"):
        quantize_int8(source, tmp_path / "int8.onnx", images(model, 2), "best")
    assert list(tmp_path.iterdir()) == []
    for key in ("fp16", "int8", "openvino"):
        with pytest.raises(BadInput, match=rf"{key}: is made of the ONNX file; set export.onnx to true"):
            Export(**{key: True})


def test_the_export_stage_writes_and_measures_every_file(monkeypatch, tmp_path: Path) -> None:
    project = project_in(tmp_path / "project")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["dense"]["train"]["epochs"] = 1
    others = dict.fromkeys(("fp16", "openvino", "pt2"), find_spec("openvino") is not None)
    params["export"] = {"onnx": True, "int8": True, **others}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(project)
    for stage in ("dataset", "dense", "calibrate"):
        stages.run(stage, project)
    models.save(prune(models.load("out/dense"), "magnitude", sparsity=0.5).model, "out/distill")
    stages.run("export", project)
    written = json.loads(Path("metrics/export.json").read_text())
    for name, file in {"onnx": "model.onnx", "fp16": "fp16.onnx", "pt2": "model.pt2"}.items():
        if name == "onnx" or others[name]:
            assert written[name]["max_abs_diff"] <= written[name]["bound"]
            assert written[name]["bytes"] == Path("out/export", file).stat().st_size
    assert (written["openvino"] is None) == (not others["openvino"])
    facts = written["int8"]
    assert 0 < facts["max_abs_diff"] <= facts["bound"]
    assert facts["zeros"] == 2 * 12 * 48**2 // 2
    assert facts["images"] == 100
    assert abs(facts["int8_top1"] - facts["model_top1"]) <= 100 - facts["int8_agrees"] <= 10
    assert facts["bytes"] == Path("out/export/int8.onnx").stat().st_size
