"""One-shot structured pruning of DeiT-Tiny without training: top-1 of every method at equal sparsity or MACs.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; all values on the same images, with a
standard error of about 1.6 points. A method scores once for all columns. `in steps`: four cycles, scored again in each.
`+ correction`: norms and biases are corrected afterwards (prune.correct_norms). MACs are those of the pruned model.
Torch-Pruning's row is its best setting from benchmarks/accuracy/torch_pruning.py, which must run before.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/structured.json and docs/results/structured.md.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.deit_tiny import Entry, Goal, lines, measure, rows, setup
from benchmarks.lib.results import RESULTS, arguments, real_data, write_results, write_table

ROOT = Path(__file__).parents[2]
STEPS = 4

GOALS = (
    Goal("25 % of FFN", {"ffn": 0.25}, bound=78.0),
    Goal("50 % of FFN", {"ffn": 0.5}, bound=73.0),
    Goal("70 % of FFN", {"ffn": 0.7}, bound=52.0, deep=True),
    Goal("25 % of attention", {"attention": 0.25}, bound=79.8),
    Goal("50 % of attention", {"attention": 0.5}, bound=75.0),
    Goal("10 % of residual", {"residual": 0.1}),
    Goal("0.85x MACs", macs=0.85),
    Goal("0.7x MACs", macs=0.7, bound=77.5),
    Goal("0.5x MACs", macs=0.5, bound=62.0, deep=True),
)
ENTRIES = (
    Entry("channel-magnitude"),
    Entry("channel-taylor"),
    Entry("channel-taylor", "global"),
    Entry("corp"),
    Entry("upvits-fisher", ours=True),
    Entry("upvits-refit", ours=True),
    Entry("upvits-global", ours=True, refit=False),
    Entry("upvits-global", ours=True),
    Entry("unit-obs", "layer", ours=True),
    Entry("unit-obs", correction=True, ours=True),
    Entry("unit-obs", steps=STEPS, correction=True, ours=True),
)


def main() -> None:
    """Measure every row and write the tables."""
    quick = arguments(__doc__).quick
    real_data()
    goals = [GOALS[1], GOALS[7]] if quick else list(GOALS)
    entries = [Entry("corp"), Entry("unit-obs", ours=True)] if quick else list(ENTRIES)
    done = measure(
        sorted(entries, key=lambda entry: -entry.steps), goals, RESULTS / f"structured{'-quick' * quick}-notes.jsonl"
    )
    dense = setup().top1
    if not quick:
        write_table(
            ROOT / "docs/results/structured.md",
            "One-shot structured pruning of DeiT-Tiny, no training",
            __doc__ or "",
            ["method", *(goal.name for goal in goals)],
            [
                ["dense", *([f"{dense:.1f}"] * len(goals))],
                ["Torch-Pruning, best setting", *peers(goals)],
                *lines(done, entries, goals),
            ],
        )
    write_results("structured", rows(done, goals, dense, not quick), quick)


def peers(goals: Sequence[Goal]) -> list[str]:
    """Return Torch-Pruning's best top-1 for the goals of its benchmark; a dash for the others."""
    path = RESULTS / "peers.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    cells = []
    for goal in goals:
        prefix = f"{goal.macs:g}x MACs: " if goal.macs else f"{goal.name.replace(' %', '%').lower()}: "
        of_goal = [row for row in rows if row["what"].startswith(prefix)]
        values = [row["value"] for row in of_goal if not row["what"].endswith("calibration")]
        cells.append(f"{max(values):.1f}" if values else "-")
    return cells


if __name__ == "__main__":
    main()
