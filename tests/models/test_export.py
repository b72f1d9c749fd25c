"""Exported models give the logits of the original."""

import re
from pathlib import Path

import numpy
import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import SMALL, images, predict, random_masks, redrawn, tiny
from tests.support.other_models import make_model
from tests.support.pruned_models import FAMILIES, all_cut
from vitprune import BadInput, find_groups, load, merge_tokens, onnx_to_fp16, onnx_to_openvino, prune, shrink
from vitprune.data import example_input
from vitprune.models.export import export_onnx, export_timm
from vitprune.models.export_check import BOUND, ExportError, expected_logits
from vitprune.models.pt2 import export_pt2


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


def merged_tokens() -> nn.Module:
    """Return a model that merges tokens, with another width in every FFN."""
    model = merge_tokens(tiny("vit", dtype=torch.float32), 3)
    groups = find_groups(model, ["ffn"])
    return shrink(model, groups, {g.name: random_masks([g], 1 + n)[g.name] for n, g in enumerate(groups)}).eval()


def accepts_sizes() -> nn.Module:
    """Return a ViT for images of any size, with another width in every FFN."""
    model = redrawn(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **FAMILIES["vit"][1]), 0)
    groups = find_groups(model, ["ffn"])
    return shrink(model, groups, {g.name: random_masks([g], 1 + n)[g.name] for n, g in enumerate(groups)}).eval()


FORMATS = {
    "vit": lambda: all_cut("vit"),
    "swin": lambda: all_cut("swin"),
    "merged": merged_tokens,
    "any size": accepts_sizes,
    "pvt": lambda: all_cut("pvt"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_logits_of_torch_in_its_own_engine(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    openvino = pytest.importorskip("openvino", reason="the engine extra is not installed")
    model, dynamic = FORMATS[name](), name in ("any size", "pvt")
    x, source = images(model, 2), tmp_path / "model.onnx"
    facts = {
        "model.onnx": export_onnx(model, source, x, dynamic_size=dynamic, external_data=name == "merged"),
        "fp16.onnx": onnx_to_fp16(source, tmp_path / "fp16.onnx", model, x, dynamic_size=dynamic),
        "model.pt2": export_pt2(model, tmp_path / "model.pt2", x, dynamic_size=dynamic),
    }
    if name != "any size":  # OpenVINO interpolates position embeddings otherwise at their border
        facts["openvino.xml"] = onnx_to_openvino(source, tmp_path / "openvino.xml", model, x, dynamic_size=dynamic)
    written = sorted(path.name for path in tmp_path.iterdir())
    data = ["model.onnx.data"] * (name == "merged")
    openvino_files = ["openvino.bin", "openvino.xml"] * (name != "any size")
    assert written == ["fp16.onnx", "model.onnx", *data, "model.pt2", *openvino_files]
    for path in tmp_path.iterdir():
        assert not re.search(rb"/[\w.-]+/[\w./-]+\.py", path.read_bytes()), path  # no path of this machine

    def session(file: str):
        run = onnxruntime.InferenceSession(str(tmp_path / file), providers=["CPUExecutionProvider"]).run
        return lambda batch: torch.from_numpy(run(["logits"], {"images": batch.numpy()})[0])

    engines = {name: session(name) for name in ("model.onnx", "fp16.onnx")}
    if openvino_files:
        exact = openvino.Core().compile_model(tmp_path / "openvino.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        engines["openvino.xml"] = lambda batch: torch.from_numpy(exact([batch.numpy()])[0])
    engines["model.pt2"] = torch.export.load(tmp_path / "model.pt2").module()
    sizes = [x.shape[2:], (64, 96)] if dynamic else [x.shape[2:]]
    for number, size in [(1, sizes[0]), (5, sizes[-1])]:
        batch = torch.randn((number, 3, *size), generator=torch.Generator().manual_seed(number))
        logits = predict(model, batch)
        for file, engine in engines.items():
            difference = float((engine(batch).detach() - logits).abs().max())
            assert difference <= (facts[file]["bound"] if file == "fp16.onnx" else 1e-4), (file, size)
    for file, values in facts.items():
        allowed = BOUND["float16" if file == "fp16.onnx" else "float32"]
        assert 0 <= values["max_abs_diff"] <= values["bound"] < allowed * (1 + 10)
        others = [path for path in tmp_path.iterdir() if path.name in (f"{file}.data", file.replace(".xml", ".bin"))]
        assert values["bytes"] == sum(path.stat().st_size for path in {tmp_path / file, *others})
    assert (tmp_path / "fp16.onnx").stat().st_size < 0.75 * facts["model.onnx"]["bytes"]


def test_other_image_sizes_are_refused_where_the_model_has_only_one(tmp_path: Path) -> None:
    model = tiny("vit", dtype=torch.float32)
    for export in (export_onnx, export_pt2):
        with pytest.raises(ExportError, match=r"^export.dynamic_size: the model accepts only images of 32x32 \("):
            export(model, tmp_path / "model.pt2", images(model, 2), dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", BOUND)
def test_logits_beyond_the_bound_of_a_precision_are_refused(precision: str) -> None:
    model = tiny("vit", dtype=torch.float32)
    expected = expected_logits(model, images(model, 2))
    largest = float(expected.logits[0].abs().max())
    for factor, passes in ((0.9, True), (1.1, False), (float("nan"), False)):
        shift = factor * BOUND[precision] * (1 + largest)
        shifted = {len(batch): logits + shift for batch, logits in zip(expected.batches, expected.logits, strict=True)}
        if passes:
            found = expected.compare("export.onnx", lambda batch, by=shifted: by[len(batch)], precision)
            assert found["max_abs_diff"] == pytest.approx(shift, rel=0.01)
        else:
            with pytest.raises(ExportError, match=r"^export.onnx: the logits of the exported file differ by .*, more"):
                expected.compare("export.onnx", lambda batch, by=shifted: by[len(batch)], precision)


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_a_directory_in_place_of_the_file_is_refused(write, tmp_path: Path) -> None:
    model = tiny("vit").float()
    with pytest.raises(BadInput, match=r"cannot be written \(Is a directory\); give another path$"):
        write(model, tmp_path, example_input(model, 2))
    assert not list(tmp_path.iterdir())


def test_a_file_that_no_engine_reads_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the engine extra is not installed")
    model, source = tiny("vit", dtype=torch.float32), tmp_path / "model.onnx"
    source.write_bytes(b"no model")
    for convert, path in ((onnx_to_fp16, "fp16.onnx"), (onnx_to_openvino, "openvino.xml")):
        with pytest.raises(ExportError, match=r"^export.(fp16|openvino): .*model.onnx cannot be converted \(") as error:
            convert(source, tmp_path / path, model, images(model, 2))
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(BadInput, match=r"openvino: OpenVINO reads files with the suffix .xml"):
        onnx_to_openvino(source, tmp_path / "openvino", model, images(model, 2))


def test_a_model_that_cannot_be_exported_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model = tiny("vit", dtype=torch.float32)
    model.head.register_forward_hook(lambda module, inputs, output: output if output.sum() > 0 else -output)
    with pytest.raises(ExportError, match=r"^export.onnx: torch cannot export this model \(") as error:
        export_onnx(model, tmp_path / "model.onnx", images(model, 2))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_pruned_transformers_model_is_exported_with_its_logits(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model, x = make_model("vit"), torch.randn(3, 3, 64, 64)
    pruned = prune(model, "channel-magnitude", sparsity={"ffn": 0.5, "head": 0.5}).model
    with torch.no_grad():
        expected = pruned(x).logits
    source = tmp_path / "model.onnx"
    assert export_onnx(pruned, source, x[:2])["max_abs_diff"] < 1e-4
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), expected)
    onnx_to_fp16(source, tmp_path / "fp16.onnx", pruned, x[:2])
    export_pt2(pruned, tmp_path / "model.pt2", x[:2])
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), expected)
    assert type(pruned(x)).__name__ == "ImageClassifierOutput"


def test_a_pruned_transformers_model_is_converted_to_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the engine extra is not installed")
    model, x = make_model("vit"), torch.randn(2, 3, 64, 64)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert onnx_to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", model, x)["max_abs_diff"] < 1e-4
