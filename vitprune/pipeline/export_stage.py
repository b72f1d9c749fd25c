"""The export stage: a timm directory with a model card, and ONNX files in float32 and INT8."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune import data, models
from vitprune.config.params import Params
from vitprune.models.card import write_card
from vitprune.models.export import ExportError, export_onnx, export_timm
from vitprune.models.int8 import quantize_and_compare
from vitprune.pipeline.project_data import METRICS, OUT, calibration, labelled_by_output, open_images
from vitprune.runtime.files import write_json


def run(params: Params) -> None:
    """Write out/export and metrics/export.json; each exported model is compared with the final model."""
    model, folder = models.load(OUT / "distill"), OUT / "export"
    example = data.example_input(model, 2)
    facts: dict[str, Any] = {"timm": export_timm(model, folder / "timm", example), "onnx": None, "int8": None}
    write_card(folder / "timm", Path())
    if params.export.onnx:
        facts["onnx"] = _onnx(model, folder / "model.onnx", example, params)
    if params.export.int8 and "error" not in facts["onnx"]:
        table = labelled_by_output(open_images("eval", model, params), model)
        evaluation = data.eval_batches(table, params.evaluate.batch_size)
        facts["int8"] = quantize_and_compare(folder, calibration(model, params), evaluation)
    write_json(METRICS / "export.json", facts)


def _onnx(model: nn.Module, path: Path, example: Tensor, params: Params) -> dict[str, Any]:
    """Export to ONNX; a model that cannot be exported costs the file, not the run."""
    try:
        return export_onnx(model, path, example, opset=params.export.opset)
    except ExportError as error:
        print(f"vitprune export: {error}", file=sys.stderr)
        return {"error": str(error)}
