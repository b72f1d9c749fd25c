"""Latency table: time of every group at several widths on a device, as a CSV file that can be filled by hand."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from vitprune.errors import BadInput
from vitprune.groups import Group, Masks
from vitprune.runtime.files import atomic_write, read_regular_file

COLUMNS = ("group", "width", "milliseconds")
WHOLE_MODEL = "model"  # group of the row that has the dense model's latency, and no width
ADDITIVE = ("ffn", "attention", "head")  # kinds whose groups share no layer, so that their times add up
Times = Mapping[int, float]  # by width: milliseconds
LARGEST = 10 << 20  # bytes of a file
RECORD = "record one by vitprune latency-table"


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a model on a device.

    Only differences between the times of a group count, so they may be times of its layers, as a profiler shows them,
    or times above that of the smallest width.

    Attributes:
        milliseconds: Latency of the dense model.
        times: By name of a group, or by a pattern such as blocks.*.mlp: milliseconds by width. A width is the number of
            remaining units, for attention of every head.
        source: File of the table, for error messages.
        notes: Lines about device and measurement.
    """

    milliseconds: float
    times: Mapping[str, Times]
    source: str = "latency table"
    notes: Sequence[str] = field(default_factory=tuple)

    def group_times(self, group: Group) -> np.ndarray:
        """Return the milliseconds of a group by its width, for the widths 0 to that of the dense model.

        The measured times are fitted by a monotone function, between them it is linear, and below the smallest width it
        is constant.

        Raises:
            BadInput: the table does not have this group, or not its full width.
        """
        if group.kind not in ADDITIVE:
            raise BadInput(
                f"{self.source}: times of kind {group.kind} do not add up; prune {', '.join(ADDITIVE)}, or remove "
                "prune.target.table"
            )
        from sklearn.isotonic import IsotonicRegression  # takes two seconds, which every stage would wait

        matching = [pattern for pattern in self.times if fnmatchcase(group.name, pattern)]
        patterns = [group.name] if group.name in self.times else matching
        if len(patterns) != 1:
            named = f"{' and '.join(patterns[:2])} both match" if patterns else "no row names"
            raise BadInput(f"{self.source}: {named} group {group.name}; vitprune inspect lists the groups")
        times, width = self.times[patterns[0]], group.shape[-1]
        if max(times) != width:
            raise BadInput(
                f"{self.source}: {patterns[0]} is given up to width {max(times)}, and {group.name} has {width}; "
                "use the table of this model"
            )
        measured = sorted(times)
        smooth = IsotonicRegression().fit_transform(measured, [times[width] for width in measured])
        result: np.ndarray = np.interp(np.arange(width + 1), measured, smooth)
        return result

    def all_times(self, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """Return `group_times` of all groups by name.

        Raises:
            BadInput: the table does not fit a group, or the groups take longer than the model.
        """
        result = {group.name: self.group_times(group) for group in groups}
        total = sum(float(times[-1] - times[1]) for times in result.values())
        if total >= self.milliseconds:
            raise BadInput(
                f"{self.source}: the groups take {total:.4g} ms in all and the model only {self.milliseconds:.4g}; "
                "correct one of them"
            )
        return result

    def fraction_at(self, times: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> float:
        """Return the latency of the model with groups of given widths, as a fraction of the dense model's.

        Args:
            times: The result of `all_times`.
            widths: Width by name of the group.
        """
        saved = sum(float(times[name][-1] - times[name][width]) for name, width in widths.items())
        return 1 - saved / self.milliseconds


def kept_width(group: Group, masks: Masks) -> int:
    """Return the number of units that a mask keeps; for attention, of every head."""
    return int(masks[group.name].sum()) // (group.units // group.shape[-1])


def write_latency_table(table: LatencyTable, path: Path) -> None:
    """Write a table as CSV; its notes become comment lines."""
    with atomic_write(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {note}\n" for note in table.notes)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerow([WHOLE_MODEL, "", f"{table.milliseconds:.5g}"])
        writer.writerows(
            [name, width, f"{milliseconds:.5g}"]
            for name, times in table.times.items()
            for width, milliseconds in sorted(times.items())
        )


def read_latency_table(path: Path) -> LatencyTable:
    """Read a table.

    Raises:
        BadInput: the file is missing or is no such table; the message names the line.
    """
    try:
        lines = read_regular_file(path, LARGEST).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; {RECORD}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8 text; {RECORD}") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not rows or _cells(rows[0][1]) != list(COLUMNS):
        raise BadInput(f"{path}: the first line must be {','.join(COLUMNS)}; correct it, or {RECORD}")
    times: dict[str, dict[int, float]] = {}
    for number, line in rows[1:]:
        name, width, milliseconds = _parsed(line, f"{path}, line {number}")
        if width in times.setdefault(name, {}):
            raise BadInput(f"{path}, line {number}: {name} has this width twice; remove one")
        times[name][width] = milliseconds
    if WHOLE_MODEL not in times:
        raise BadInput(f"{path}: no row {WHOLE_MODEL},,MILLISECONDS has the latency of the dense model; add it")
    ((_, dense),) = times.pop(WHOLE_MODEL).items()
    notes = tuple(line.lstrip("# ") for line in lines if line.startswith("#"))
    return LatencyTable(dense, times, str(path), notes)


def _parsed(line: str, where: str) -> tuple[str, int, float]:
    """Return group, width (0 for the whole model) and milliseconds of a row."""
    cells = _cells(line)
    if len(cells) != len(COLUMNS):
        raise BadInput(f"{where}: has {len(cells)} values; give group, width and milliseconds")
    name, width = cells[0], cells[1] or "0"
    if not width.isascii() or not width.isdigit() or (int(width) == 0) != (name == WHOLE_MODEL):
        raise BadInput(f"{where}: width {cells[1]!r} must be a whole number from 1, and empty for {WHOLE_MODEL}")
    try:
        milliseconds = float(cells[2])
    except ValueError:
        milliseconds = math.nan
    if not (math.isfinite(milliseconds) and milliseconds >= (1e-9 if name == WHOLE_MODEL else 0)):
        raise BadInput(f"{where}: {cells[2]!r} is no time; give milliseconds such as 1.25")
    return name, int(width), milliseconds


def _cells(line: str) -> list[str]:
    return [cell.strip() for row in csv.reader([line]) for cell in row]
