"""One-shot structured pruning of DeiT-Tiny without any training: top-1 of every method where the same goes.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; every figure on the same images, so one
has a standard error of about 1.6 points. A method scores once; every size is cut from those scores. `in steps` cuts
in four cycles and scores again in each; `+ correction` moves norms and biases afterwards (prune.correct_norms). MACs
are those of what is left. Torch-Pruning's line is its best set-up of
benchmarks/accuracy/torch_pruning.py, which has to run before.
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
    Goal("25 % of FFN", {"ffn": 0.25}, wanted=78.0),
    Goal("50 % of FFN", {"ffn": 0.5}, wanted=73.0),
    Goal("70 % of FFN", {"ffn": 0.7}, wanted=52.0, deep=True),
    Goal("25 % of attention", {"attention": 0.25}, wanted=79.8),
    Goal("50 % of attention", {"attention": 0.5}, wanted=75.0),
    Goal("10 % of residual", {"residual": 0.1}),
    Goal("0.85x MACs", macs=0.85),
    Goal("0.7x MACs", macs=0.7, wanted=77.5),
    Goal("0.5x MACs", macs=0.5, wanted=62.0, deep=True),
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
    """Measure every line and write the tables."""
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
                ["Torch-Pruning, its best", *peers(goals)],
                *lines(done, entries, goals),
            ],
        )
    write_results("structured", rows(done, goals, dense, not quick), quick)


def peers(goals: Sequence[Goal]) -> list[str]:
    """Torch-Pruning's best at the goals that its own benchmark has; a dash at the others."""
    path = RESULTS / "peers.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    found = []
    for aim in goals:
        named = f"{aim.macs:g}x MACs: " if aim.macs else f"{aim.name.replace(' %', '%').lower()}: "
        same = [row for row in rows if row["what"].startswith(named)]
        own = [row["value"] for row in same if not row["what"].endswith("calibration")]
        found.append(f"{max(own):.1f}" if own else "-")
    return found


if __name__ == "__main__":
    main()
