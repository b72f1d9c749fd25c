"""What a pruning cycle leaves behind: masks, the spread of scores, and what the model does and costs after it."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from vitprune import data, models, tables
from vitprune.compress import Cycle
from vitprune.evaluate import count
from vitprune.files import digest
from vitprune.groups import Group, Masks, Scores
from vitprune.records import sparsity_rows, summary_rows, write_json

MASKS = "masks.safetensors"


def write_masks(directory: Path, groups: Iterable[Group], masks: Masks) -> dict[str, Any]:
    """Write masks and the table of what each group keeps; returns the sparsity per kind and the masks' digest."""
    rows = sparsity_rows(groups, masks)
    models.write_weights(masks, directory / MASKS)
    tables.write(rows, tables.SPARSITY, directory / "sparsity.parquet")
    by_kind = pa.Table.from_pylist(rows).group_by("kind").aggregate([("units", "sum"), ("kept", "sum")]).to_pylist()
    sparsity = {row["kind"]: 1 - row["kept_sum"] / row["units_sum"] for row in by_kind}
    return {"sparsity": sparsity, "masks_sha256": digest(directory / MASKS)}


def write_cycle(
    parent: Path, cycle: Cycle, scores: Scores, model: nn.Module, before: float, after: float
) -> dict[str, Any]:
    """Write a cycle under parent/NN; returns its row of plots/cycles.csv. Top-1 before and after recovery, percent."""
    directory = parent / f"{cycle.number:02d}"
    tables.write(summary_rows(cycle.groups, scores), tables.SCORES, directory / "scores.parquet")
    facts = {"cycle": cycle.number, "target": dict(cycle.target)} | write_masks(directory, cycle.groups, cycle.masks)
    facts |= asdict(count(model, data.example_input(model, 1))) | {"top1_before": before, "top1_after": after}
    facts |= {"settled": dict(cycle.facts)} if cycle.facts else {}
    write_json(directory / "metrics.json", facts)
    units = sum(group.units for group in cycle.groups)
    removed = units - sum(int(mask.sum()) for mask in cycle.masks.values())
    columns = ("top1_before", "top1_after", "params", "macs", "nonzero_params", "nonzero_macs")
    return {"cycle": cycle.number, "sparsity": removed / units} | {column: facts[column] for column in columns}
