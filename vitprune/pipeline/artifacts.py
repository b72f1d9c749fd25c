"""Facts as files: JSON metrics, CSV plots, training histories, and the rows of the summary tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.files import atomic_write, write_csv


class History:
    """The curve of a stage's training: one JSON line per epoch as it goes, a CSV for plots at the end."""

    def __init__(self, directory: Path, stage: str, writes: bool = True):
        self.stage, self._writes = stage, writes
        self._rows: list[dict[str, Any]] = []
        self._path = directory / "history.jsonl"
        if writes:  # of several processes, the first
            directory.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)  # the record of an earlier run may hold a link to the old file
            self._path.touch()

    @property
    def epochs(self) -> int:
        """Epochs recorded so far."""
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is recorded so far."""
        return list(self._rows)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was recorded before, in the place of what is there."""
        self._rows = [dict(row) for row in rows]
        if self._writes:
            with atomic_write(self._path) as partial:
                partial.write_text("".join(self._line(row) for row in self._rows))

    def add(self, row: Mapping[str, float], cycle: int | None = None) -> None:
        """Append one epoch."""
        numbered = ({} if cycle is None else {"cycle": cycle}) | dict(row)
        self._rows.append(numbered)
        if self._writes:
            with self._path.open("a") as file:
                file.write(self._line(numbered))

    def close(self, plot: Path) -> None:
        """Write the whole curve as CSV."""
        write_csv(plot, self._rows)

    def _line(self, row: Mapping[str, Any]) -> str:
        return json.dumps({"stage": self.stage} | dict(row)) + "\n"


def sparsity_rows(groups: Iterable[Group], masks: Masks) -> list[dict[str, Any]]:
    """Rows of tables.SPARSITY: what each group keeps."""
    kept = {group.name: int(masks[group.name].sum()) for group in groups}
    return [
        {
            "group": g.name,
            "kind": g.kind,
            "units": g.units,
            "kept": kept[g.name],
            "sparsity": 1 - kept[g.name] / g.units,
        }
        for g in groups
    ]


def summary_rows(groups: Iterable[Group], scores: Scores) -> list[dict[str, Any]]:
    """Rows of tables.SCORES: the spread of each group's scores."""
    return [{"group": g.name, "kind": g.kind, "units": g.units} | _spread(scores[g.name]) for g in groups]


def _spread(score: torch.Tensor) -> dict[str, float]:
    ranked = score[score.isfinite()].double().sort().values  # what cannot go scores infinity
    places = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
    found = {name: float(ranked[round(place * (len(ranked) - 1))]) for name, place in places.items()}
    return found | {"mean": float(ranked.mean())}
