"""Write the comparison table of README.md from benchmarks/results.

Every number is a value of benchmarks/results/NAME.json, of the row that FIGURES names; nothing is measured here.
`--check` writes nothing and exits with 1 if the table differs from the results.
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
HEADER = ["", "vitprune", "compared with", "page"]
FITTED = ", fitted to the dense model on 200 images without labels"


@dataclass(frozen=True)
class Value:
    """A value of a results file: the row that the whole pattern matches; several rows are combined by `pick`."""

    results: str
    row: str
    pick: Callable[[Sequence[float]], float] = mean

    def read(self) -> float:
        """Return the value; exit with a message if no row matches."""
        numbers = [number for row, number in results(self.results).items() if re.fullmatch(self.row, row)]
        if not numbers:
            sys.exit(f"benchmarks/results/{self.results}.json: no row {self.row!r}; run its benchmark")
        return self.pick(numbers)


@dataclass(frozen=True)
class Figure:
    """A row of the table: what was measured, both values, whose the second one is, its format, and the page."""

    about: str
    page: str
    ours: Value
    theirs: Value
    whose: str
    shown: str = "{:.1f} %"

    def cells(self) -> list[str]:
        """Return the cells of the row."""
        one, other = (self.shown.format(value.read()) for value in (self.ours, self.theirs))
        return [self.about, f"**{one}**", f"{other} {self.whose}", f"[{self.page}](docs/results/{self.page}.md)"]


def other_libraries(goal: str) -> Value:
    """Return the best value of the libraries that remove single weights."""
    return Value("sparsifiers", f"(?!vitprune)(?!dense).*, {goal}", max)


def label_free(about: str, goal: str, seed: str, note: str) -> Figure:
    """Return a row for units that are removed with 200 images; seed -1: without reconstruction."""
    ours, theirs = (
        Value("label_free", f"{goal}, {method}, 200 images, seed {seed}") for method in ("unit-obs", "Torch-Pruning")
    )
    return Figure(about, "label_free", ours, theirs, f"Torch-Pruning, best setting, {note}")


def merging(macs: str, merged: int) -> Figure:
    """Return a row for units removed from a model that merges tokens."""
    about = f"{macs} MACs, {merged} tokens merged before every block but the first"
    best = Value("peers", f"{macs} MACs: (?!.*calibration).*(?<!MACs)(?<!params)", max)
    ours = Value("token_merging", f"{macs} MACs, {merged} merged")
    return Figure(about, "token_merging", ours, best, "Torch-Pruning, best setting, all tokens")


FIGURES = (
    Figure(
        "50 % of the weights zero",
        "sparsifiers",
        Value("sparsifiers", "vitprune, obc, 50 %"),
        other_libraries("50 %"),
        "SparseGPT, the best of five libraries",
    ),
    Figure(
        "2:4 pattern" + FITTED,
        "label_free",
        Value("label_free", r"2:4, obc, 200 images, seed \d"),
        other_libraries("2:4"),
        "SparseGPT, the best of five libraries, not fitted",
    ),
    label_free("50 % of the FFN units removed", "half of the FFN", "-1", "norms corrected in the same way"),
    label_free("0.7x MACs", "0.7x MACs", "-1", "norms corrected in the same way"),
    label_free("0.5x MACs" + FITTED, "0.5x MACs", r"\d", "fitted in the same way"),
    merging("0.7x", 8),
    merging("0.5x", 16),
    Figure(
        "0.7x MACs, then 50 % of the remaining weights zero",
        "stacked",
        Value("stacked", "unit-obs to 0.7x MACs, then obc 50%"),
        Value("stacked", "unit-obs to 0.7x MACs, then magnitude 50%"),
        "magnitude",
    ),
    Figure(
        "90 % of the weights zero in five steps, 18 batches of training after each (Imagenette)",
        "gradual",
        Value("gradual", "ovit, cyclic, 90%"),
        Value("gradual", "magnitude, cyclic, 90%"),
        "magnitude",
    ),
    Figure(
        "0.5x MACs, then 75 steps of distillation (Imagenette)",
        "recovery",
        Value("recovery", "vitprune .*after, seed .*"),
        Value("recovery", "Torch-Pruning .*after, seed .*"),
        "Torch-Pruning, best setting",
    ),
)


@cache
def results(name: str) -> dict[str, float]:
    """Return the values of a results file by row name."""
    rows = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    return {row["what"]: row["value"] for row in rows}


def table(figures: Sequence[Figure]) -> str:
    """Return the Markdown table."""
    rows = [HEADER, ["---"] * len(HEADER), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Write the table to README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--quick", action="store_true", help="same as --check")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    now = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table(FIGURES)}\n{END}", before, flags=re.DOTALL)
    if options.check or options.quick:
        sys.exit(f"{path}: run python -m benchmarks.docs.readme_table" if now != before else 0)
    path.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    main()
