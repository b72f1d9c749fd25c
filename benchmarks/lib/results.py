"""Command line, result rows and Markdown pages of the benchmarks."""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from vitprune.evaluation.latency import environment

RowType = TypeVar("RowType")  # a dataclass

RESULTS = Path(__file__).parents[1] / "results"
STARTED = time.monotonic()
NOTES = "-notes"  # in the name of a file with the rows of an interrupted run, which the next run continues
CONTINUED = {path.name.partition(NOTES)[0] for path in RESULTS.glob(f"*{NOTES}*")}


@dataclass(frozen=True)
class Row:
    """One measured value; `target` and `holds` are set if the documentation promises a bound."""

    what: str
    value: float
    unit: str
    target: str | None = None
    holds: bool | None = None
    runs: int = 1


class Recorded(list[RowType]):
    """Rows of a benchmark that continues after an interruption: those of benchmarks/results/NAME-notes.jsonl.

    Args:
        name: Name of the results file.
        row_type: The dataclass of a row.
        quick: Start over, in a file of its own.
    """

    def __init__(self, name: str, row_type: type[RowType], quick: bool) -> None:
        self._path = RESULTS / f"{name}{'-quick' * quick}{NOTES}.jsonl"
        if quick:
            self._path.unlink(missing_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        super().__init__(row_type(**json.loads(line)) for line in lines)

    def record(self, *rows: RowType) -> None:
        """Append rows to the list and to the file, and print them."""
        self.extend(rows)
        with self._path.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)  # type: ignore[call-overload]
        print(*rows, sep="\n", flush=True)


def arguments(about: str | None, extra: Mapping[str, tuple[Any, str]] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        about: The benchmark's docstring, printed by --help.
        extra: Further options, name -> (default, help).

    Returns:
        The options; `quick` asks for a short form that takes at most 5 minutes on 2 cores.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, not written into the documents")
    for name, (default, text) in (extra or {}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text}; default: {default}")
    parsed = parser.parse_args()
    parsed.quick = bool(parsed.quick)
    return parsed


def real_data() -> Path:
    """Return the folder of real weights and images; exit with a message if VITPRUNE_REAL_DATA is not set."""
    folder = os.environ.get("VITPRUNE_REAL_DATA")
    if not folder:
        print("VITPRUNE_REAL_DATA is not set: this benchmark needs real weights and images (CONTRIBUTING.md)")
        sys.exit(0)
    return Path(folder)


def machine() -> str:
    """Describe the machine: device, CPU, versions of torch and Python."""
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{facts['device']}, {facts['cores']} x {facts['cpu']}, torch {facts['torch']}, Python {facts['python']}"


def write_results(name: str, rows: Sequence[Row], quick: bool) -> None:
    """Print the rows and write them to benchmarks/results/NAME.json, one per line (quick: NAME-quick.json, untracked).

    The seconds of the command are written as well, except where it continued an interrupted run; rows that it did not
    measure again keep their machine and date. Exit with code 1 if a promised bound does not hold.
    """
    RESULTS.mkdir(exist_ok=True)
    stamp: dict[str, Any] = {"machine": machine(), "date": datetime.date.today().isoformat()}
    path = RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")
    if path.stem not in CONTINUED:
        stamp["run_seconds"] = round(time.monotonic() - STARTED)
    before = json.loads(path.read_text()) if path.stem in CONTINUED and path.exists() else []
    stamps = {(row["what"], row["value"]): {key: row[key] for key in ("machine", "date")} for row in before}
    records = [json.dumps(asdict(row) | stamps.get((row.what, row.value), stamp)) for row in rows]
    path.write_text("[\n" + ",\n".join(records) + "\n]\n")
    table = Table("what", "value", "unit", "target", "holds", title=f"{name}: {stamp['machine']}")
    for row in rows:
        holds = {True: "yes", False: "NO", None: ""}[row.holds]
        table.add_row(row.what, f"{row.value:.4g}", row.unit, row.target or "", holds)
    Console().print(table)
    if any(row.holds is False for row in rows):
        sys.exit(1)


@dataclass(frozen=True)
class Section:
    """A section of a page: heading, text, table."""

    heading: str
    about: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_table(path: Path, title: str, about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a Markdown page with one table."""
    _write_page(path, title, about, _table(header, rows))


def write_sections(path: Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """Write a Markdown page of several tables."""
    lines = []
    for section in sections:
        lines += ["", f"## {section.heading}", "", " ".join(section.about.split()), ""]
        lines += _table(section.header, section.rows)
    _write_page(path, title, about, lines[1:])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _write_page(path: Path, title: str, about: str, body: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = f"{datetime.date.today().isoformat()}, {machine()}"
    if path.stem in CONTINUED:
        measured += f"; rows of earlier runs: machine and date in benchmarks/results/{path.stem}.json"
    lines = [f"# {title}", "", " ".join(about.split()), "", measured, ""]
    path.write_text("\n".join([*lines, *body]) + "\n")
