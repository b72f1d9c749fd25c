"""The table of figures in README.md, from the results that the other benchmarks have written.

Every figure is a value of a benchmarks/results/NAME.json, of the row that FIGURES names; nothing is measured here.
`--check` writes nothing and ends with 1 where the table is not what the results say.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- benchmarks/docs/readme_table.py -->", "<!-- end -->"
HEADER = ["", "vitprune", "beside it", ""]


@dataclass(frozen=True)
class Value:
    """A value of a results file: of the row that the pattern matches whole, or of several, by what they come to."""

    results: str
    row: str
    pick: Callable[[Sequence[float]], float] = mean

    def read(self) -> float:
        """It, or the end of this script with a word about what is missing."""
        found = [number for row, number in results(self.results).items() if re.fullmatch(self.row, row)]
        if not found:
            sys.exit(f"benchmarks/results/{self.results}.json: no row {self.row!r}; run benchmarks/{self.results}.py")
        return self.pick(found)


@dataclass(frozen=True)
class Figure:
    """A line of the table: what was measured, ours, theirs and whose that is, how a value reads, and the page."""

    about: str
    page: str
    ours: Value
    theirs: Value
    whose: str
    shown: str = "{:.1f} %"

    def cells(self) -> list[str]:
        """The line's cells."""
        one, other = (self.shown.format(value.read()) for value in (self.ours, self.theirs))
        return [self.about, f"**{one}**", f"{other} {self.whose}", f"[{self.page}](docs/results/{self.page}.md)"]


def one_shot(about: str, goal: str, theirs: str = "magnitude") -> Figure:
    """A line of the table of single weights."""
    ours, other = Value("oneshot", f"best of ours, {goal}"), Value("oneshot", f"{theirs}, {goal}")
    return Figure(about, "oneshot", ours, other, "by magnitude")


def structured(about: str, goal: str, peers: str) -> Figure:
    """A line of the table of units, beside the best of Torch-Pruning's settings."""
    best = Value("peers", f"{peers}: (?!.*calibration).*(?<!MACs)(?<!params)", max)
    return Figure(about, "structured", Value("structured", f"best of ours, {goal}"), best, "by Torch-Pruning's best")


FIGURES = (
    one_shot("half of the weights at zero", "50 %"),
    one_shot("2 of every 4 weights at zero", "2:4", "n:m"),
    structured("half of the FFN units gone", "50 % of FFN", "50% of ffn"),
    structured("0.7x MACs", "0.7x MACs", "0.7x MACs"),
    Figure(
        "0.7x MACs, and half of the weights left at zero",
        "stacked",
        Value("stacked", "unit-obs to 0.7x MACs, then obc 50%"),
        Value("stacked", "unit-obs to 0.7x MACs, then magnitude 50%"),
        "by magnitude",
    ),
    Figure(
        "90 % of the weights at zero in five steps, 18 batches of training after each (Imagenette)",
        "gradual",
        Value("gradual", "ovit, cyclic, 90%"),
        Value("gradual", "magnitude, cyclic, 90%"),
        "by magnitude",
    ),
    Figure(
        "0.5x MACs, then 75 steps of training (Imagenette)",
        "recovery",
        Value("recovery", "vitprune .*after, seed .*"),
        Value("recovery", "Torch-Pruning .*after, seed .*"),
        "by Torch-Pruning's best",
    ),
)


@cache
def results(name: str) -> dict[str, float]:
    """The values of a benchmark by what they are of."""
    rows = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    return {row["what"]: row["value"] for row in rows}


def table(figures: Sequence[Figure]) -> str:
    """The lines of the table."""
    rows = [HEADER, ["---"] * len(HEADER), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Write the table into README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--quick", action="store_true", help="the same")
    given = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    now = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table(FIGURES)}\n{END}", before, flags=re.DOTALL)
    if given.check or given.quick:
        sys.exit(f"{path}: run python benchmarks/docs/readme_table.py" if now != before else 0)
    path.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    main()
