"""ONNX files that DeepSparse 1.8 supports completely, in float and in INT8.

Float: opset 13, in which LayerNorm and GELU are elementary operators, attention that is not fused, and a fixed batch
size. The operator LayerNormalization of opset 17 is not supported.

INT8: integer products as SparseML's exporter writes them. In QDQ format, the engine computes the products in float;
scales per channel, INT32 biases of Conv and Gemm, and Gemm on quantized weights are not supported there.
"""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from torch import Tensor, nn

from vitprune.runtime.eval_mode import unfused_attention

OPSET = 13


def export_float(model: nn.Module, path: Path, images: Tensor) -> Tensor:
    """Export a model for the batch size of the images; return the logits that torch computes (B, classes)."""
    with torch.no_grad(), unfused_attention(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's newer exporter writes opset 18 or later
        names = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(model.eval(), (images,), str(path), dynamo=False, opset_version=OPSET, **names)
        logits: Tensor = model(images)
    return logits


def export_int8(source: Path, path: Path, images: Tensor) -> None:
    """Quantize the linear layers of the blocks and their inputs; the rest remains in float.

    Weights are symmetric per output channel, so that zeros remain zeros; ranges of inputs are those of the images.
    """
    graph = onnx.load(source).graph
    weights = {tensor.name for tensor in graph.initializer}
    layers = [node.name for node in graph.node if node.op_type == "MatMul" and weights.intersection(node.input)]
    batches = iter([{"images": images.numpy()}])
    logging.disable(logging.WARNING)  # advice to optimize the model first
    try:
        quantization.quantize_static(
            source,
            path,
            SimpleNamespace(get_next=lambda: next(batches, None)),
            nodes_to_quantize=layers,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    finally:
        logging.disable(logging.NOTSET)
    model = onnx.load(path)
    replaced = integer_products(model.graph)
    if replaced != len(layers):
        raise SystemExit(f"{path}: {replaced} of {len(layers)} layers became integer products")
    onnx.checker.check_model(model)
    onnx.save(model, path)


def integer_products(graph: onnx.GraphProto) -> int:
    """Replace DequantizeLinear, MatMul by MatMulInteger, Cast, Mul; return the number of replaced products."""
    producers = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    nodes, replaced = [], 0
    for node in graph.node:
        sources = [producers.get(name) for name in node.input]
        if node.op_type != "MatMul" or any(s is None or s.op_type != "DequantizeLinear" for s in sources):
            nodes.append(node)
            continue
        (x, x_scale, x_zero), (weight, weight_scale, weight_zero) = (source.input for source in sources if source)
        output = node.output[0]
        scale = numpy_helper.to_array(values[x_scale]) * numpy_helper.to_array(values[weight_scale])
        graph.initializer.append(numpy_helper.from_array(scale, f"{output}_scale"))
        nodes += [
            helper.make_node("MatMulInteger", [x, weight, x_zero, weight_zero], [f"{output}_int32"], node.name),
            helper.make_node("Cast", [f"{output}_int32"], [f"{output}_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{output}_float", f"{output}_scale"], [output]),
        ]
        replaced += 1
    used = {name for node in nodes for name in node.input}
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in used)
    return replaced
