"""Recompute a finished run's reported values from its artifacts; yield one message per mismatch."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vitprune import models
from vitprune.architectures import structure
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, shrink
from vitprune.pipeline.artifacts import MASKS, SCORES, mask_facts, model_facts, sparsity_rows, summary_rows
from vitprune.pipeline.calibrate_stage import calibration_facts, draw_rows
from vitprune.pipeline.dataset_stage import dataset_facts, manifest_of
from vitprune.pipeline.evaluate_stage import COSTS, EVALUATION, kept_costs, top1_of
from vitprune.pipeline.project_data import CALIBRATION, MANIFEST, METRICS, OUT, PLOTS, source_of
from vitprune.pipeline.prune_stage import cycle_row
from vitprune.pruning.cycle_masks import groups_for
from vitprune.pruning.plan import plan_of
from vitprune.runtime import tables
from vitprune.runtime.files import read_csv, read_json, sha256

Lines = Iterator[str]
Row = Mapping[str, Any]


def images(params: Params) -> Lines:
    """Hash every image of the source again and compare the manifest: ids, labels, splits and checksums."""
    source = source_of(params)
    manifest = manifest_of(source, params)
    yield from _rows(MANIFEST, tables.read_table(MANIFEST, tables.MANIFEST).to_pylist(), manifest.rows)
    yield from _facts(METRICS / "dataset.json", dataset_facts(source, manifest, params))


def calibration(params: Params) -> Lines:
    """Draw the calibration set again and compare its images and their order."""
    drawn = draw_rows(params)
    yield from _rows(CALIBRATION, tables.read_table(CALIBRATION, tables.CALIBRATION).to_pylist(), drawn)
    yield from _facts(METRICS / "calibrate.json", calibration_facts(drawn, params))


def scores(params: Params) -> Lines:
    """Compare the scores with their checksum and summary, and the first masks with their metrics."""
    plan, folder = plan_of(params), OUT / "score"
    dense = models.load(OUT / "dense")
    groups = {group.name: group for group in groups_for(dense, plan)}
    saved = models.read_weights(folder / SCORES)
    expected = summary_rows([groups[name] for name in saved if name in groups], saved)
    by_group = {row["group"]: row for row in tables.read_table(folder / "summary.parquet", tables.SCORES).to_pylist()}
    yield from _rows(folder / "summary.parquet", [by_group.get(row["group"], {}) for row in expected], expected)
    yield from _facts(METRICS / "score.json", {"method": params.prune.method, "sha256": sha256(folder / SCORES)})
    yield from _masks(OUT / "mask", METRICS / "mask.json", list(groups.values()))


def cycles(params: Params) -> Lines:
    """Compare every cycle's masks with its model, tables and the previous cycle, and the last with `prune`'s model."""
    plan, dense = plan_of(params), models.load(OUT / "dense")
    groups = groups_for(dense, plan)
    folders = [OUT / "cycles" / f"{number:02d}" for number in range(1, plan.config.cycles + 1)]
    present = sorted(OUT.glob("cycles/[0-9]*"))
    if present != folders:
        yield f"out/cycles: contains {[path.name for path in present]}, but prune.cycles is {plan.config.cycles}"
        return
    previous, label = models.read_weights(OUT / "mask" / MASKS), "out/mask"
    rows = []
    for number, folder in enumerate(folders, 1):
        masks = models.read_weights(folder / MASKS)
        yield from _masks(folder, folder / "metrics.json", groups)
        yield from _regrown(folder, previous, masks, label)
        yield from _wrong_shapes(folder, dense, groups, masks)
        yield from _costs(folder, folder / "metrics.json")
        rows.append(cycle_row(number, groups, masks, read_json(folder / "metrics.json")))
        previous, label = masks, "the previous cycle"
    yield from _rows(PLOTS / "cycles.csv", _numbers(PLOTS / "cycles.csv"), rows)
    last = read_json(folders[-1] / "metrics.json")
    facts = {"cycles": plan.config.cycles, "sha256": last["sha256"], "top1": last["top1_after"]}
    yield from _facts(METRICS / "prune.json", facts)


def weights(params: Params) -> Lines:
    """Count parameters and MACs of the dense, the pruned and the final model again, and compare their checksums."""
    for stage in ("dense", "prune", "distill"):
        yield from _costs(OUT / stage, METRICS / f"{stage}.json")
    evaluated = read_json(METRICS / "evaluate.json")
    for name, stage in (("dense", "dense"), ("pruned", "distill")):
        metrics = read_json(METRICS / f"{stage}.json")
        expected = {key: metrics[key] for key in (*COSTS, "top1", "top5")}
        yield from _mismatches(f"metrics/evaluate.json: {name}", evaluated[name], expected)


def evaluation(params: Params) -> Lines:
    """Compute top-1 and the figures that depend on it again from the predictions for single images."""
    rows = tables.read_table(EVALUATION, tables.EVALUATION).to_pylist()
    manifest = tables.read_table(MANIFEST, tables.MANIFEST).to_pylist()
    eval_rows = [{"id": row["id"], "label": row["label"]} for row in manifest if row["split"] == "eval"]
    yield from _rows(EVALUATION, rows, eval_rows)
    reported = read_json(METRICS / "evaluate.json")
    top1 = {name: top1_of(rows, name) for name in ("dense", "pruned")}
    for name, value in top1.items():
        yield from _mismatches(f"metrics/evaluate.json: {name}", reported[name], {"top1": value})
    yield from _mismatches("metrics/evaluate.json: kept", reported["kept"], kept_costs(reported))
    drop = {"top1_drop": top1["dense"] - top1["pruned"], "images": len(rows)}
    yield from _mismatches("metrics/evaluate.json", reported, drop)


def curves(params: Params) -> Lines:
    """Compare every training history with its plot, and its length with the number of epochs in the metrics."""
    for stage in ("dense", "prune", "distill"):
        path = OUT / stage / "history.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = [{name: value for name, value in row.items() if name != "stage"} for row in rows]
        yield from _rows(PLOTS / f"{stage}.csv", _numbers(PLOTS / f"{stage}.csv"), values)
        if stage != "prune":
            yield from _facts(METRICS / f"{stage}.json", {"epochs": len(rows)})


def exported(params: Params) -> Lines:
    """Compare the exported weights with the final model's, and the model card with the exported weights."""
    folder = OUT / "export/timm"
    path = folder / models.WEIGHTS
    final, export = models.read_weights(OUT / "distill" / models.WEIGHTS), models.read_weights(path)
    if final.keys() != export.keys():
        yield f"{path}: has other tensors than out/distill"
    for name, tensor in export.items():
        if name in final and not tensor.equal(final[name]):
            yield f"{path}: {name} differs from out/distill"
    card = (folder / "README.md").read_text(encoding="utf-8")
    for what, checksum in (
        ("weights", sha256(path)),
        ("masks", read_json(sorted(OUT.glob("cycles/[0-9]*"))[-1] / "metrics.json")["masks_sha256"]),
    ):
        if checksum not in card:
            yield f"{folder / 'README.md'}: does not contain the sha256 of the {what}, {checksum}"


CHECKS: dict[str, Callable[[Params], Lines]] = {
    check.__name__: check for check in (images, calibration, scores, cycles, weights, evaluation, curves, exported)
}


def recheck(name: str, params: Params) -> Lines:
    """Run one of CHECKS in the current directory; an artifact that cannot be read is a mismatch, too.

    Yields:
        One line per mismatch.
    """
    try:
        yield from CHECKS[name](params)
    except BadInput as error:
        yield str(error)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        yield f"{name}: cannot be computed again ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _masks(folder: Path, facts: Path, groups: Sequence[Group]) -> Lines:
    masks = models.read_weights(folder / MASKS)
    for group in groups:
        if group.name not in masks or masks[group.name].numel() != group.units:
            yield f"{folder / MASKS}: no mask of {group.units} units for {group.name}"
            return
    path = folder / "sparsity.parquet"
    yield from _rows(path, tables.read_table(path, tables.SPARSITY).to_pylist(), sparsity_rows(groups, masks))
    yield from _facts(facts, mask_facts(groups, masks) | {"masks_sha256": sha256(folder / MASKS)})


def _regrown(folder: Path, before: Masks, masks: Masks, label: str) -> Lines:
    """Yield a line for every group with units that earlier masks have removed."""
    for name, mask in masks.items():
        regrown = int((mask & ~before[name]).sum()) if name in before else mask.numel()
        if regrown:
            yield f"{folder / MASKS}: {name} keeps {regrown} units that {label} removed"


def _wrong_shapes(folder: Path, dense: nn.Module, groups: Sequence[Group], masks: Masks) -> Lines:
    """Compare the shapes and the zeros of a cycle's model with those that its masks give."""
    model = models.load(folder)
    structured = [group for group in groups if group.kind != "weight"]
    expected, actual = structure(shrink(copy.deepcopy(dense), structured, masks)), structure(model)
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            yield f"{folder}: {name} has shape {actual.get(name)}, its masks give {expected.get(name)}"
    for group in groups:
        if group.kind == "weight":
            nonzero = int(model.get_parameter(group.name)[~masks[group.name]].count_nonzero())
            if nonzero:
                yield f"{folder}: {nonzero} weights of {group.name} are not zero although its masks remove them"


def _costs(folder: Path, facts: Path) -> Lines:
    yield from _facts(facts, model_facts(models.load(folder), folder))


def _rows(path: Path, reported: Sequence[Row], expected: Sequence[Row]) -> Lines:
    if len(reported) != len(expected):
        yield f"{path}: has {len(reported)} rows, computed again {len(expected)}"
    for number, (row, recomputed) in enumerate(zip(reported, expected, strict=False)):
        label = recomputed.get("id") or recomputed.get("group")
        yield from _mismatches(f"{path}: row {number}" + (f" ({label})" if label else ""), row, recomputed)


def _facts(path: Path, expected: Row) -> Lines:
    yield from _mismatches(str(path), read_json(path), expected)


def _mismatches(label: str, reported: Row, expected: Row) -> Lines:
    for key, value in expected.items():
        if not _same(reported.get(key), value):
            yield f"{label}: {key} is {_shortened(reported.get(key))}, computed again {_shortened(value)}"


def _same(reported: Any, expected: Any) -> bool:
    if isinstance(reported, Mapping) and isinstance(expected, Mapping):
        return reported.keys() == expected.keys() and all(_same(reported[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(reported, float | int):
        close = math.isclose(reported, expected, rel_tol=1e-9, abs_tol=1e-12)
        return close or (math.isnan(reported) and math.isnan(expected))
    return bool(reported == expected)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _numbers(path: Path) -> list[dict[str, Any]]:
    """Read a CSV file without its empty cells, numbers as numbers."""
    return [{name: _number(text) for name, text in row.items() if text != ""} for row in read_csv(path)]


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
