"""Files that several stages write: masks, sparsity and score tables, training histories, costs of a saved model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from vitprune import data, models
from vitprune.evaluation.cost import count
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_csv, write_text

MASKS, SCORES = "masks.safetensors", "scores.safetensors"
REMOVED_FACTS = {"block": "removed_blocks", "branch": "removed_branches"}  # kind: key of the module paths


class History:
    """The curve of a stage's training: history.jsonl with one line per epoch, and a CSV file for plots.

    Args:
        directory: Directory of history.jsonl.
        stage: Name of the stage.
        writes: False on every rank but 0, which keep the rows in memory only.
    """

    def __init__(self, directory: Path, stage: str, writes: bool = True):
        self.stage, self._writes = stage, writes
        self._rows: list[dict[str, Any]] = []
        self._path = directory / "history.jsonl"
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)  # the record of an earlier run may hold a link to the old file
            self._path.touch()

    @property
    def epochs(self) -> int:
        """Number of epochs recorded."""
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A copy of the recorded rows."""
        return list(self._rows)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the recorded rows by those of a checkpoint."""
        self._rows = [dict(row) for row in rows]
        if self._writes:
            write_text(self._path, "".join(self._line(row) for row in self._rows))

    def add(self, row: Mapping[str, float], cycle: int | None = None) -> None:
        """Append one epoch."""
        numbered = ({} if cycle is None else {"cycle": cycle}) | dict(row)
        self._rows.append(numbered)
        if self._writes:
            with self._path.open("a") as file:
                file.write(self._line(numbered))

    def close(self, plot: Path) -> None:
        """Write the curve as CSV."""
        write_csv(plot, self._rows)

    def _line(self, row: Mapping[str, Any]) -> str:
        return json.dumps({"stage": self.stage} | dict(row)) + "\n"


def model_facts(model: nn.Module, directory: Path) -> dict[str, Any]:
    """Return parameters and MACs of a model and the SHA-256 of its weights in a directory."""
    counts = count(model, data.example_input(model, 1))
    return asdict(counts) | {"sha256": sha256(directory / models.WEIGHTS)}


def write_masks(directory: Path, groups: Sequence[Group], masks: Masks) -> dict[str, Any]:
    """Write masks and the sparsity of every group; return `mask_facts` and the SHA-256 of the masks."""
    models.write_weights(masks, directory / MASKS)
    tables.write_table(sparsity_rows(groups, masks), tables.SPARSITY, directory / "sparsity.parquet")
    return mask_facts(groups, masks) | {"masks_sha256": sha256(directory / MASKS)}


def mask_facts(groups: Sequence[Group], masks: Masks) -> dict[str, Any]:
    """Return the sparsity of each kind, and the module paths of removed blocks and branches."""
    rows = sparsity_rows(groups, masks)
    by_kind = pa.Table.from_pylist(rows).group_by("kind").aggregate([("units", "sum"), ("kept", "sum")]).to_pylist()
    facts: dict[str, Any] = {"sparsity": {row["kind"]: 1 - row["kept_sum"] / row["units_sum"] for row in by_kind}}
    for group in groups:
        if group.kind in REMOVED_FACTS:
            pairs = zip(group.sublayers, masks[group.name], strict=True)
            facts[REMOVED_FACTS[group.kind]] = list(dict.fromkeys(body for (body, *_), keep in pairs if not keep))
    return facts


def sparsity_rows(groups: Iterable[Group], masks: Masks) -> list[dict[str, Any]]:
    """Return the rows of tables.SPARSITY: units, kept units and sparsity of each group."""
    kept = {group.name: int(masks[group.name].sum()) for group in groups}
    return [
        {"group": g.name, "kind": g.kind, "units": g.units}
        | {"kept": kept[g.name], "sparsity": 1 - kept[g.name] / g.units}
        for g in groups
    ]


def summary_rows(groups: Iterable[Group], scores: Scores) -> list[dict[str, Any]]:
    """Return the rows of tables.SCORES: quartiles and mean of each group's finite scores, null without."""
    return [{"group": g.name, "kind": g.kind, "units": g.units, **_quartiles(scores[g.name])} for g in groups]


def _quartiles(score: torch.Tensor) -> Mapping[str, float | None]:
    ranked = score[score.isfinite()].double().sort().values  # units that must not be removed score infinity
    ranks = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
    if not len(ranked):  # of a layer that does not fit an N:M pattern and that a rule ignores
        return dict.fromkeys((*ranks, "mean"))
    quartiles = {name: float(ranked[round(rank * (len(ranked) - 1))]) for name, rank in ranks.items()}
    return quartiles | {"mean": float(ranked.mean())}
