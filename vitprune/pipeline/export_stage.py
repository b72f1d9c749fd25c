"""The export stage: a timm directory with a model card, and the files that `export` asks for."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune import data, models
from vitprune.config.params import Params
from vitprune.models.card import write_card
from vitprune.models.export import export_onnx, export_timm
from vitprune.models.export_check import ExportError
from vitprune.models.fp16 import onnx_to_fp16
from vitprune.models.int8 import quantize_and_compare
from vitprune.models.openvino_ir import onnx_to_openvino
from vitprune.models.pt2 import export_pt2
from vitprune.pipeline.project_data import METRICS, OUT, calibration, labeled_by_output, open_images
from vitprune.runtime.files import write_json

Facts = dict[str, Any]


def run(params: Params) -> None:
    """Write out/export and metrics/export.json; each exported model is compared with the final model."""
    model, folder = models.load(OUT / "distill"), OUT / "export"
    example = data.example_input(model, 2)
    facts: Facts = {"timm": export_timm(model, folder / "timm", example)}
    write_card(folder / "timm", Path())
    writers = _writers(model, folder, example, params)
    for name, write in writers.items():
        is_wanted = getattr(params.export, name)
        from_onnx = name not in ("onnx", "pt2")
        facts[name] = _written(write) if is_wanted and not (from_onnx and "error" in facts["onnx"]) else None
    write_json(METRICS / "export.json", facts)


def _writers(model: nn.Module, folder: Path, example: Tensor, params: Params) -> dict[str, Callable[[], Facts]]:
    """Return by setting of `export` the function that writes its file; the ONNX file is the source of some others."""
    source, dynamic = folder / "model.onnx", {"dynamic_size": params.export.dynamic_size}

    def int8() -> Facts:
        table = labeled_by_output(open_images("eval", model, params), model)
        evaluation = data.eval_batches(table, params.evaluate.batch_size)
        return quantize_and_compare(folder, model, calibration(model, params), evaluation)

    return {
        "onnx": lambda: export_onnx(model, source, example, opset=params.export.opset, **dynamic),
        "fp16": lambda: onnx_to_fp16(source, folder / "fp16.onnx", model, example, **dynamic),
        "int8": int8,
        "openvino": lambda: onnx_to_openvino(source, folder / "openvino.xml", model, example, **dynamic),
        "pt2": lambda: export_pt2(model, folder / "model.pt2", example, **dynamic),
    }


def _written(write: Callable[[], Facts]) -> Facts:
    """Write a file; if the model cannot be exported to it, return the error instead."""
    try:
        return write()
    except ExportError as error:
        print(f"vitprune export: {error}", file=sys.stderr)
        return {"error": str(error)}
