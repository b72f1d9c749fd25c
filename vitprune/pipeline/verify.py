"""What a finished run's files say, computed once more from what they speak of; every difference is a line."""

import copy
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from vitprune import data, models
from vitprune.architectures import structure
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.evaluation.accuracy import count
from vitprune.groups import Group, Masks, shrink
from vitprune.pipeline import stage_context
from vitprune.pipeline.artifacts import sparsity_rows, summary_rows
from vitprune.pipeline.cycles import MASKS, SCORES, mask_facts
from vitprune.pipeline.stage_context import CALIBRATION, MANIFEST
from vitprune.pruning.cycle_masks import groups_for
from vitprune.pruning.plan import plan_of
from vitprune.runtime import tables
from vitprune.runtime.files import sha256

OUT, METRICS, PLOTS, WEIGHTS = Path("out"), Path("metrics"), Path("plots"), models.WEIGHTS
COSTS = ("params", "nonzero_params", "macs", "nonzero_macs", "nominal_macs")
Lines = Iterator[str]


def images(params: Params) -> Lines:
    """Read every image of the source again: the manifest's rows, their labels, splits and digests."""
    settings, source = params.dataset, stage_context.source_of(params)
    built = data.build_manifest(source, settings.eval_fraction, params.seed, settings.skip_limit)
    yield from _rows(MANIFEST, tables.read(MANIFEST, tables.MANIFEST).to_pylist(), built.rows)
    splits = [row["split"] for row in built.rows]
    facts = {
        "source": settings.source,
        "classes": len({row["label"] for row in built.rows}),
        "class_names": None if source.classes is None else list(source.classes),
        "train": splits.count("train"),
        "eval": splits.count("eval"),
        "skipped": len(built.skipped),
        "overlap": built.overlap,
        "sha256": sha256(MANIFEST),
    }
    yield from _facts(METRICS / "dataset.json", facts)


def calibration(params: Params) -> Lines:
    """Draw the calibration set again: which images, in which order, with which bytes."""
    manifest, settings = tables.read(MANIFEST, tables.MANIFEST), params.calibrate
    drawn = data.draw_calibration(
        manifest, stage_context.source_of(params), settings.size, settings.balance, params.seed
    )
    yield from _rows(CALIBRATION, tables.read(CALIBRATION, tables.CALIBRATION).to_pylist(), drawn)
    facts = {"images": len(drawn), "balance": settings.balance, "sha256": sha256(CALIBRATION)}
    yield from _facts(METRICS / "calibrate.json", facts)


def scores(params: Params) -> Lines:
    """Compare the scores with their digest and the table of their spread, and the first masks with their record."""
    plan, folder = plan_of(params), OUT / "score"
    dense = models.load(OUT / "dense")
    groups = {group.name: group for group in groups_for(dense, plan)}
    found = models.read_weights(folder / SCORES)
    said = tables.read(folder / "summary.parquet", tables.SCORES).to_pylist()
    own = summary_rows([groups[name] for name in found if name in groups], found)
    by_group = {row["group"]: row for row in said}
    yield from _rows(folder / "summary.parquet", [by_group.get(row["group"], {}) for row in own], own)
    yield from _facts(METRICS / "score.json", {"method": plan.method, "sha256": sha256(folder / SCORES)})
    yield from _masks(OUT / "mask", METRICS / "mask.json", list(groups.values()))


def cycles(params: Params) -> Lines:
    """Compare every cycle's masks with its model, tables and the cycle before, and the last with `prune`'s model."""
    plan, dense = plan_of(params), models.load(OUT / "dense")
    groups = groups_for(dense, plan)
    folders = [OUT / "cycles" / f"{number:02d}" for number in range(1, plan.cycles + 1)]
    there = sorted(OUT.glob("cycles/[0-9]*"))
    if there != folders:
        yield f"out/cycles: holds {[path.name for path in there]}, params.yaml asks for {plan.cycles} cycles"
        return
    kept: Masks | None = None
    for folder in folders:
        masks = models.read_weights(folder / MASKS)
        yield from _masks(folder, folder / "metrics.json", groups)
        yield from _grown(folder, kept or models.read_weights(OUT / "mask" / MASKS), masks, first=kept is None)
        yield from _cut_by(folder, dense, groups, masks)
        yield from _costs(folder, folder / "metrics.json")
        kept = masks
    yield from _cycle_rows(folders, groups)
    last = _json(folders[-1] / "metrics.json")
    facts = {"cycles": plan.cycles, "sha256": last["sha256"], "top1": last["top1_after"]}
    yield from _facts(METRICS / "prune.json", facts)


def weights(params: Params) -> Lines:
    """Count parameters and MACs of the dense, the pruned and the final model again, and compare their digests."""
    for stage in ("dense", "prune", "distill"):
        yield from _costs(OUT / stage, METRICS / f"{stage}.json")
    evaluated = _json(METRICS / "evaluate.json")
    for name, stage in (("dense", "dense"), ("pruned", "distill")):
        said, own = evaluated[name], _json(METRICS / f"{stage}.json")
        yield from _differing(
            f"metrics/evaluate.json: {name}", said, {key: own[key] for key in (*COSTS, "top1", "top5")}
        )


def evaluation(params: Params) -> Lines:
    """Compute top-1 and what follows from it again from the table of single images."""
    path = OUT / "evaluate/evaluation.parquet"
    rows = tables.read(path, tables.EVALUATION).to_pylist()
    manifest = tables.read(MANIFEST, tables.MANIFEST).to_pylist()
    held_out = [{"id": row["id"], "label": row["label"]} for row in manifest if row["split"] == "eval"]
    yield from _rows(path, rows, held_out)
    said = _json(METRICS / "evaluate.json")
    top1 = {name: 100 * sum(row[name] == row["label"] for row in rows) / len(rows) for name in ("dense", "pruned")}
    for name, value in top1.items():
        yield from _differing(f"metrics/evaluate.json: {name}", said[name], {"top1": value})
    kept = {cost: said["pruned"][cost] / said["dense"][cost] for cost in COSTS}
    yield from _differing("metrics/evaluate.json: kept", said["kept"], kept)
    drop = {"top1_drop": top1["dense"] - top1["pruned"], "images": len(rows)}
    yield from _differing("metrics/evaluate.json", said, drop)


def curves(params: Params) -> Lines:
    """Compare every training history with its plot, and its length with the epochs that were counted."""
    for stage in ("dense", "prune", "distill"):
        path = OUT / stage / "history.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        plotted = _csv(PLOTS / f"{stage}.csv")
        numbers = [{name: value for name, value in row.items() if name != "stage"} for row in rows]
        yield from _rows(PLOTS / f"{stage}.csv", plotted, numbers)
        if stage != "prune":
            yield from _facts(METRICS / f"{stage}.json", {"epochs": len(rows)})


def exported(params: Params) -> Lines:
    """Compare the exported weights with the final model's, and the model card with the weights beside it."""
    folder = OUT / "export/timm"
    final, own = models.read_weights(OUT / "distill" / WEIGHTS), models.read_weights(folder / WEIGHTS)
    if final.keys() != own.keys():
        yield f"{folder / WEIGHTS}: has other weights than out/distill"
    yield from (f"{folder / WEIGHTS}: {name} is not out/distill's" for name in own if _differs(own, final, name))
    card = (folder / "README.md").read_text(encoding="utf-8")
    for what, expected in (
        ("weights", sha256(folder / WEIGHTS)),
        ("masks", _json(sorted(OUT.glob("cycles/[0-9]*"))[-1] / "metrics.json")["masks_sha256"]),
    ):
        if expected not in card:
            yield f"{folder / 'README.md'}: does not name the sha256 of the {what}, {expected}"


CHECKS: dict[str, Callable[[Params], Lines]] = {
    check.__name__: check for check in (images, calibration, scores, cycles, weights, evaluation, curves, exported)
}


def recheck(name: str, params: Params) -> Lines:
    """Carry out one of CHECKS in the current directory; what cannot be read is a difference too."""
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
    own = sparsity_rows(groups, masks)
    yield from _rows(
        folder / "sparsity.parquet", tables.read(folder / "sparsity.parquet", tables.SPARSITY).to_pylist(), own
    )
    yield from _facts(facts, mask_facts(groups, masks) | {"masks_sha256": sha256(folder / MASKS)})


def _grown(folder: Path, before: Masks, now: Masks, first: bool) -> Lines:
    """What a cycle took back; the first has the very masks of the mask stage, unless blocks went one at a time."""
    for name, mask in now.items():
        back = int((mask & ~before[name]).sum()) if name in before else mask.numel()
        if back:
            where = "out/mask" if first else "the cycle before"
            yield f"{folder / MASKS}: {name} keeps {back} units that {where} removed"


def _cut_by(folder: Path, dense: nn.Module, groups: Sequence[Group], masks: Masks) -> Lines:
    """Whether a cycle's model has the shapes, or the zeros, that its masks leave of the dense model."""
    model = models.load(folder)
    units = [group for group in groups if group.kind != "weight"]
    wanted, own = structure(shrink(copy.deepcopy(dense), units, masks)), structure(model)
    for name in sorted(wanted.keys() | own.keys()):
        if wanted.get(name) != own.get(name):
            yield f"{folder}: {name} has the shape {own.get(name)}, its masks leave {wanted.get(name)}"
    for group in groups:
        if group.kind == "weight":
            left = int(model.get_parameter(group.name)[~masks[group.name]].count_nonzero())
            if left:
                yield f"{folder}: {left} weights of {group.name} are not zero where its masks remove them"


def _costs(folder: Path, facts: Path) -> Lines:
    model = models.load(folder)
    counts = asdict(count(model, data.example_input(model, 1)))
    yield from _facts(facts, counts | {"sha256": sha256(folder / WEIGHTS)})


def _cycle_rows(folders: Sequence[Path], groups: Sequence[Group]) -> Lines:
    own = []
    for number, folder in enumerate(folders, 1):
        masks, facts = models.read_weights(folder / MASKS), _json(folder / "metrics.json")
        units = sum(group.units for group in groups)
        removed = units - sum(int(mask.sum()) for mask in masks.values())
        columns = ("top1_before", "top1_after", "params", "macs", "nonzero_params", "nonzero_macs")
        own.append({"cycle": number, "sparsity": removed / units} | {column: facts[column] for column in columns})
    yield from _rows(PLOTS / "cycles.csv", _csv(PLOTS / "cycles.csv"), own)


def _rows(path: Path, said: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> Lines:
    if len(said) != len(found):
        yield f"{path}: has {len(said)} rows, computed again {len(found)}"
    for number, (row, own) in enumerate(zip(said, found, strict=False)):
        label = own.get("id") or own.get("group")
        yield from _differing(f"{path}: row {number}" + (f" ({label})" if label else ""), row, own)


def _facts(path: Path, found: Mapping[str, Any]) -> Lines:
    yield from _differing(str(path), _json(path), found)


def _differing(where: str, said: Mapping[str, Any], found: Mapping[str, Any]) -> Lines:
    for key, own in found.items():
        if not _same(said.get(key), own):
            yield f"{where}: {key} is {_told(said.get(key))}, computed again {_told(own)}"


def _same(said: Any, own: Any) -> bool:
    if isinstance(said, Mapping) and isinstance(own, Mapping):
        return said.keys() == own.keys() and all(_same(said[key], own[key]) for key in own)
    if isinstance(own, float) and isinstance(said, float | int):
        return math.isclose(said, own, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(said) and math.isnan(own))
    return bool(said == own)


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _differs(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return name in other and not one[name].equal(other[name])


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _number(text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
