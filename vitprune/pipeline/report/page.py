"""Render the HTML report: headline, comparison and provenance; `sections` and `curves` make the other sections."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.pipeline.report import curves, inputs, numbers, sections
from vitprune.pipeline.report.numbers import Quantity
from vitprune.runtime.files import read_optional_json, write_text
from vitprune.runtime.top5 import shows_top5

_MODELS = ("dense", "pruned")
_ACCURACIES = (("top1", "Top-1 accuracy, %"), ("top5", "Top-5 accuracy, %"))
_SIZES = (  # key, label, note, key of the row that it repeats where no weight is zero
    ("params", "Parameters", "stored in the model", ""),
    ("nonzero_params", "Nonzero parameters", "without exact zeros", "params"),
    ("macs", "MACs", "multiply-adds per image", ""),
    ("nonzero_macs", "Nonzero MACs", "without exact-zero weights", "macs"),
    ("nominal_macs", "Nominal MACs", "zeros spread evenly over layers, as in papers", "macs"),
)
_DIGESTS = (
    ("dataset", "data/manifest.parquet"),
    ("calibrate", "data/calibration.parquet"),
    ("dense", "out/dense/model.safetensors"),
    ("prune", "out/prune/model.safetensors"),
    ("distill", "out/distill/model.safetensors"),
)
_FILES = {"onnx": "ONNX", "fp16": "float16", "int8": "INT8", "openvino": "OpenVINO", "pt2": "torch.export"}
_ENVIRONMENT = {
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "device": "Device",
    "cpu": "CPU",
    "gpu": "GPU",
    "cores": "Cores",
    "threads": "Threads",
}


def write_report(project: Path, out: Path) -> None:
    """Write the report of a project directory to the file `out`; the same inputs give the same bytes.

    Sections with missing inputs are omitted; only metrics/evaluate.json is required.

    Raises:
        BadInput: metrics/evaluate.json is missing, or a file cannot be read or contradicts another.
    """
    write_text(out, _render(project))


def _render(project: Path) -> str:
    evaluation = _evaluation(project / "metrics/evaluate.json")
    dataset = read_optional_json(project / "metrics/dataset.json")
    calibration = read_optional_json(project / "metrics/calibrate.json")
    names = sections.class_names(dataset)
    dense_top1 = float(evaluation["dense"]["top1"])
    return inputs.template("report.html.j2").render(
        headline=_headline(evaluation, _source(dataset)),
        images=numbers.grouped("images", numbers.finite(evaluation.get("images"))),
        comparison=_comparison(evaluation),
        latency=_latency_setting(evaluation),
        losses=sections.losses(project / "out/evaluate/evaluation.parquet", evaluation, names),
        sparsity=sections.sparsity(project / "out"),
        cycles=curves.cycles(project, dense_top1),
        training=curves.training(project / "plots", dense_top1),
        calibration=sections.calibration(project / "data/calibration.parquet", names),
        balance=inputs.look_up(calibration, "balance"),
        dataset=_dataset(dataset),
        export=_export(project / "metrics/export.json"),
        params=inputs.read_params(project / "params.yaml"),
        commit=inputs.read_commit(project),
        digests=_digests(project / "metrics"),
        environment=_environment(evaluation),
    )


def _evaluation(path: Path) -> dict[str, Any]:
    evaluation = inputs.read_evaluation(path.parent)
    if evaluation is None:
        raise BadInput(f"{path}: no such file; run `vitprune evaluate` first")
    for key in (f"{model}.{figure}" for model in _MODELS for figure in ("top1", "params", "macs")):
        if _number(evaluation, key) is None:
            raise BadInput(f"{path}: key {key} is missing or not a number; run `vitprune evaluate` again")
    return evaluation


def _number(record: dict[str, Any], dotted: str) -> float | None:
    return numbers.finite(inputs.look_up(record, dotted))


def _pair(evaluation: dict[str, Any], dotted: str) -> tuple[float | None, float | None]:
    return _number(evaluation, f"dense.{dotted}"), _number(evaluation, f"pruned.{dotted}")


def _source(dataset: dict[str, Any] | None) -> str:
    # Only the last part of a path, because paths differ between machines.
    kind, _, path = str(inputs.look_up(dataset, "source") or "").partition(":")
    return Path(path).stem if path else kind


def _headline(evaluation: dict[str, Any], source: str) -> tuple[str, str]:
    lead = "not smaller"
    for key, words in (("macs", "MACs"), ("params", "parameters"), ("nonzero_params", "nonzero parameters")):
        dense, pruned = _pair(evaluation, key)
        if dense and pruned is not None and pruned <= 0.995 * dense:
            lead = f"{100 * (1 - pruned / dense):.0f}\N{NARROW NO-BREAK SPACE}% fewer {words}"
            break
    before, after = (float(evaluation[model]["top1"]) for model in _MODELS)
    points = numbers.signed("", after - before, 2).text
    accuracy = f"top-1 {before:.2f} \N{RIGHTWARDS ARROW} {after:.2f}\N{NARROW NO-BREAK SPACE}% ({points} points)"
    return (f"{source}: {lead}," if source else f"{lead[:1].upper()}{lead[1:]},"), accuracy


def _comparison(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, label in _ACCURACIES if shows_top5(evaluation) else _ACCURACIES[:1]:
        dense, pruned = _pair(evaluation, key)
        cells = [numbers.fixed(f"dense.{key}", dense, 2), numbers.fixed(f"pruned.{key}", pruned, 2)]
        change = None if dense is None or pruned is None else pruned - dense
        rows.append(_row(label, "", cells, numbers.signed(f"change.{key}", change, 2), "points"))
    for key, label, note, repeated in _SIZES:
        dense, pruned = _pair(evaluation, key)
        if repeated and (dense, pruned) == _pair(evaluation, repeated):
            continue
        cells = [numbers.si_count(f"dense.{key}", dense), numbers.si_count(f"pruned.{key}", pruned)]
        rows.append(_row(label, note, cells, numbers.relative_change(f"change.{key}", dense, pruned)))
    rows.append(_latency(evaluation))
    dense, pruned = _pair(evaluation, "throughput")
    cells = [numbers.grouped("dense.throughput", dense), numbers.grouped("pruned.throughput", pruned)]
    rows.append(_row("Throughput, images/s", "", cells, numbers.relative_change("change.throughput", dense, pruned)))
    return [row for row in rows if any(cell.value is not None for cell in row["cells"])]


def _row(label: str, note: str, cells: list[Quantity], change: Quantity, unit: str = "") -> dict[str, Any]:
    return {"label": label, "note": note, "cells": cells, "change": change, "unit": unit, "spreads": []}


def _latency(evaluation: dict[str, Any]) -> dict[str, Any]:
    dense, pruned = _pair(evaluation, "latency_ms.median")
    cells = [_milliseconds("dense.latency_ms.median", dense), _milliseconds("pruned.latency_ms.median", pruned)]
    change = numbers.relative_change("change.latency_ms", dense, pruned)
    row = _row("Latency, ms", "median, p10\N{EN DASH}p90", cells, change)
    names = [[f"{model}.latency_ms.{bound}" for bound in ("p10", "p90")] for model in _MODELS]
    row["spreads"] = [[_milliseconds(name, _number(evaluation, name)) for name in pair] for pair in names]
    return row


def _milliseconds(name: str, value: float | None) -> Quantity:
    return Quantity(name, value, numbers.ABSENT if value is None else numbers.three_digits(value))


def _latency_setting(evaluation: dict[str, Any]) -> dict[str, Quantity] | None:
    batch, runs = (_number(evaluation, f"pruned.latency_ms.{key}") for key in ("batch", "runs"))
    if batch is None or runs is None:
        return None
    return {"batch": numbers.grouped("latency.batch", batch), "runs": numbers.grouped("latency.runs", runs)}


def _dataset(dataset: dict[str, Any] | None) -> dict[str, Quantity]:
    values = {key: numbers.finite(inputs.look_up(dataset, key)) for key in ("classes", "train", "eval", "skipped")}
    return {key: numbers.grouped(f"dataset.{key}", value) for key, value in values.items() if value is not None}


def _export(path: Path) -> list[tuple[str, Quantity]]:
    export = read_optional_json(path) or {}
    value = inputs.look_up(export, "timm.loads_plain_timm")
    lines = []
    if isinstance(value, bool):
        answer = Quantity("export.timm.loads_plain_timm", float(value), "yes" if value else "no")
        lines.append(("Can be loaded by plain timm", answer))
    for key, label in {"timm": "saved model", **_FILES}.items():
        difference, bound = _number(export, f"{key}.max_abs_diff"), _number(export, f"{key}.bound")
        if difference is not None:
            limit = "" if bound is None else f" (allowed: {bound:.1e})"
            shown = Quantity(f"export.{key}.max_abs_diff", difference, f"{difference:.1e}{limit}")
            lines.append((f"Largest difference of logits, {label}", shown))
    for key, label in _FILES.items():
        error, size = inputs.look_up(export, f"{key}.error"), _number(export, f"{key}.bytes")
        if isinstance(error, str):
            lines.append((f"{label} file", Quantity(f"export.{key}.error", None, f"not written: {error}")))
        if size is not None:
            lines.append((f"{label} file, bytes", numbers.grouped(f"export.{key}.bytes", size)))
    for name, label in (("model", "ONNX"), ("int8", "INT8")):
        top1 = _number(export, f"int8.{name}_top1")
        if top1 is not None:
            lines.append((f"Top-1 of the {label} file", Quantity(f"export.int8.{name}_top1", top1, f"{top1:.2f} %")))
    return lines


def _digests(metrics: Path) -> list[dict[str, str]]:
    rows = []
    for stage, path in _DIGESTS:
        digest = inputs.look_up(read_optional_json(metrics / f"{stage}.json"), "sha256")
        if isinstance(digest, str):
            rows.append({"name": f"sha256.{stage}", "path": path, "digest": digest})
    return rows


def _environment(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    value = evaluation.get("environment")
    pairs: Iterable[tuple[str, Any]] = value.items() if isinstance(value, dict) else ()
    return [
        {"name": f"environment.{key}", "label": _ENVIRONMENT.get(key) or key, "text": str(value)}
        for key, value in pairs
        if value is not None
    ]
