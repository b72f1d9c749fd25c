"""The export stage: a timm directory with a model card, and ONNX files in float32 and INT8."""

from pathlib import Path
from typing import Any

from vitprune import data, models
from vitprune.config.params import Params
from vitprune.models.card import write_card
from vitprune.models.export import export_onnx, export_timm
from vitprune.models.int8 import quantize_and_compare
from vitprune.pipeline.project_data import METRICS, OUT, calibration, open_images
from vitprune.runtime.files import write_json


def run(params: Params) -> None:
    """Write out/export and metrics/export.json; each exported model is compared with the final model."""
    model, folder = models.load(OUT / "distill"), OUT / "export"
    example = data.example_input(model, 2)
    facts: dict[str, Any] = {"timm": export_timm(model, folder / "timm", example), "onnx": None, "int8": None}
    write_card(folder / "timm", Path())
    if params.export.onnx:
        facts["onnx"] = export_onnx(model, folder / "model.onnx", example)
    if params.export.int8:
        evaluation = data.eval_batches(open_images("eval", model, params), params.evaluate.batch_size)
        facts["int8"] = quantize_and_compare(folder, calibration(model, params), evaluation)
    write_json(METRICS / "export.json", facts)
