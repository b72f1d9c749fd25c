"""The ONNX files of benchmarks/speed/deepsparse_engine.py, run by onnxruntime."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import Tensor

import vitprune
from benchmarks.lib.deepsparse_onnx import OPSET, export_float, export_int8

DEPTH = 2
LAYERS = 4 * DEPTH  # qkv, proj, fc1, fc2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    folder = tmp_path_factory.mktemp("deepsparse")
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", depth=DEPTH)
    model = vitprune.prune(dense, "uniform", sparsity=0.75).model
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    logits = export_float(model, folder / "float.onnx", images)
    export_int8(folder / "float.onnx", folder / "int8.onnx", images)
    return folder, images, logits


def _run(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def test_both_files_have_the_logits_of_torch(files: tuple[Path, Tensor, Tensor]) -> None:
    folder, images, logits = files
    assert (_run(folder / "float.onnx", images) - logits).abs().max() < 1e-5
    assert (_run(folder / "int8.onnx", images) - logits).abs().max() < 0.05 * logits.abs().max()


def test_every_layer_of_the_blocks_is_an_integer_product_with_the_zeros_of_its_mask(
    files: tuple[Path, Tensor, Tensor],
) -> None:
    folder, _, _ = files
    model = onnx.load(folder / "int8.onnx")
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["MatMulInteger"] == LAYERS
    assert operators["MatMul"] == 2 * DEPTH  # the products of attention
    assert operators["DequantizeLinear"] == operators["LayerNormalization"] == operators["Gelu"] == 0
    assert [domain.version for domain in model.opset_import] == [OPSET]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            assert (weights[node.input[1]] == 0).mean() >= 0.75
            assert (weights[node.input[3]] == 0).all()
