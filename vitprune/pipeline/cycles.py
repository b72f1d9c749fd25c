"""What a pruning cycle leaves behind: masks, the spread of scores, and what the model does and costs after it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from vitprune import data, models
from vitprune.criteria import Importance, Statistics
from vitprune.evaluation.accuracy import count
from vitprune.groups import Group, Masks, Scores
from vitprune.pipeline.artifacts import sparsity_rows, summary_rows
from vitprune.pruning.prune import Cycle
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json

MASKS, SCORES, STATISTICS = "masks.safetensors", "scores.safetensors", "statistics.safetensors"


def write_scores(directory: Path, groups: Sequence[Group], found: Importance) -> dict[str, Any]:
    """Write scores, the table of their spread and what the update needs; returns figures and the scores' digest."""
    scores = found.scores
    models.write_weights(scores, directory / SCORES)
    (directory / STATISTICS).unlink(missing_ok=True)
    if found.statistics:
        models.write_weights(found.statistics, directory / STATISTICS)
    tables.write(summary_rows(groups, scores), tables.SCORES, directory / "summary.parquet")
    units = sum(group.units for group in groups)
    return {"groups": len(groups), "units": units, **found.facts, "sha256": sha256(directory / SCORES)}


def read_statistics(directory: Path) -> Statistics | None:
    """What `write_scores` left for the update, where the method has one."""
    return models.read_weights(directory / STATISTICS) if (directory / STATISTICS).exists() else None


def write_masks(directory: Path, groups: Sequence[Group], masks: Masks) -> dict[str, Any]:
    """Write masks and the table of what each group keeps; returns the sparsity per kind and the masks' digest.

    Where whole blocks may go, also the paths of the sub-layers that have gone.
    """
    rows = sparsity_rows(groups, masks)
    models.write_weights(masks, directory / MASKS)
    tables.write(rows, tables.SPARSITY, directory / "sparsity.parquet")
    return mask_facts(groups, masks) | {"masks_sha256": sha256(directory / MASKS)}


def mask_facts(groups: Sequence[Group], masks: Masks) -> dict[str, Any]:
    """The sparsity per kind that masks leave and, where whole blocks may go, the paths of the sub-layers that have."""
    rows = sparsity_rows(groups, masks)
    by_kind = pa.Table.from_pylist(rows).group_by("kind").aggregate([("units", "sum"), ("kept", "sum")]).to_pylist()
    facts: dict[str, Any] = {"sparsity": {row["kind"]: 1 - row["kept_sum"] / row["units_sum"] for row in by_kind}}
    for group in groups:
        if group.kind == "block":
            pairs = zip(group.sublayers, masks[group.name], strict=True)
            facts["gone"] = list(dict.fromkeys(body for (body, *_), keep in pairs if not keep))
    return facts


def write_cycle(
    parent: Path, cycle: Cycle, scores: Scores, model: nn.Module, before: float, after: float
) -> dict[str, Any]:
    """Write a cycle under parent/NN, with the model as `models.load` takes it; returns its row of plots/cycles.csv.

    Top-1 before and after recovery, percent.
    """
    directory = parent / f"{cycle.number:02d}"
    models.save(model, directory)
    tables.write(summary_rows(cycle.groups, scores), tables.SCORES, directory / "scores.parquet")
    facts = {"cycle": cycle.number, "target": dict(cycle.target), "cost": dict(cycle.cost)}
    facts |= write_masks(directory, cycle.groups, cycle.masks)
    facts |= asdict(count(model, data.example_input(model, 1))) | {"top1_before": before, "top1_after": after}
    facts["sha256"] = sha256(directory / models.WEIGHTS)
    facts |= {"settled": dict(cycle.facts)} if cycle.facts else {}
    facts |= {"corrected": dict(cycle.corrected)} if cycle.corrected else {}
    write_json(directory / "metrics.json", facts)
    units = sum(group.units for group in cycle.groups)
    removed = units - sum(int(mask.sum()) for mask in cycle.masks.values())
    columns = ("top1_before", "top1_after", "params", "macs", "nonzero_params", "nonzero_macs")
    return {"cycle": cycle.number, "sparsity": removed / units} | {column: facts[column] for column in columns}
