"""One-shot pruning of DeiT-Tiny's weights without any training: top-1 of every method at several sparsities.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; every figure on the same images, so one
has a standard error of about 1.6 points. 2:4 is magnitude's in the row n:m. Second-order rows take the gradients of the
200 calibration images one by one, and score.damping 4e-6 instead of CAP's 1e-8: so few gradients do not pin the blocks
down, and this is where an update leaves the least loss on images that it has not seen (docs/LOG.md). The rows
magnitude-obs and woodfisher-joint are the masks of magnitude and woodfisher with the update of ovit. `+ correction`
moves norms and biases afterwards (prune.correct_norms).
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/oneshot.json and docs/results/oneshot.md.
"""

from pathlib import Path

from benchmarks.lib.deit_tiny import SECOND_ORDER, Entry, Goal, lines, measure, rows, setup
from benchmarks.lib.results import RESULTS, Row, arguments, real_data, write_results, write_table
from vitprune.evaluation.accuracy import accuracy

ROOT = Path(__file__).parents[2]
DENSE_ALL, TOLERANCE = 81.1, 0.2

GOALS = (
    Goal("30 %", {"weight": 0.3}),
    Goal("50 %", {"weight": 0.5}, wanted=75.0),
    Goal("60 %", {"weight": 0.6}, wanted=64.0),
    Goal("75 %", {"weight": 0.75}, wanted=20.0),
    Goal("2:4", {"weight": 0.5}, pattern="2:4", wanted=56.0),
)
ENTRIES = (
    Entry("random"),
    Entry("uniform"),
    Entry("magnitude"),
    Entry("lamp"),
    Entry("dimap"),
    Entry("n:m"),
    Entry("taylor"),
    Entry("fisher-diagonal"),
    Entry("woodfisher"),
    Entry("woodfisher-joint"),
    Entry("fastcap"),
    Entry("magnitude-obs"),
    Entry("ovit-increments"),
    Entry("ovit", ours=True),
    Entry("obc", correction=True, ours=True),
)


def main() -> None:
    """Measure every line and write the tables."""
    quick = arguments(__doc__).quick
    real_data()
    goals = [GOALS[1]] if quick else list(GOALS)
    entries = [Entry("magnitude"), Entry("n:m"), Entry("obc", ours=True)] if quick else list(ENTRIES)
    done = measure(
        sorted(entries, key=lambda entry: -ENTRIES.index(entry) if not quick else 0),
        goals,
        RESULTS / f"oneshot{'-quick' * quick}-notes.jsonl",
        SECOND_ORDER,
    )
    case = setup()
    everything = accuracy(case.dense, [*case.held_out, *case.calibration])[0]["top1"]
    close = abs(everything - DENSE_ALL) <= TOLERANCE
    if not quick:
        write_table(
            ROOT / "docs/results/oneshot.md",
            "One-shot pruning of DeiT-Tiny's weights, no training",
            __doc__ or "",
            ["method", *(goal.name for goal in goals)],
            [["dense", *([f"{case.top1:.1f}"] * len(goals))], *lines(done, entries, goals)],
        )
    whole = Row("dense, all 800 images", everything, "top-1 %", f"{DENSE_ALL} +- {TOLERANCE}", close)
    write_results("oneshot", [whole, *rows(done, goals, case.top1, not quick)], quick)


if __name__ == "__main__":
    main()
