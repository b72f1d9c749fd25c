"""One-shot pruning of DeiT-Tiny's weights without training: top-1 of every method at several sparsities.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; all values on the same images, with a
standard error of about 1.6 points. Row n:m is the 2:4 pattern by magnitude. Second-order rows use one gradient for each
of the 200 calibration images and score.damping 4e-6 instead of CAP's 1e-8: with so few gradients, this damping gives
the lowest loss on held-out images after the update (docs/LOG.md). The rows magnitude-obs and woodfisher-joint have the
masks of magnitude and woodfisher with the update of ovit. `+ correction`: norms and biases are corrected afterwards
(prune.correct_norms). Results are recorded in benchmarks/results/oneshot-notes.jsonl, so that an interrupted benchmark
continues; delete the file to start over. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/oneshot.json and
docs/results/oneshot.md.
"""

from pathlib import Path

from benchmarks.lib.deit_tiny import SECOND_ORDER, Entry, Goal, lines, measure, rows, setup
from benchmarks.lib.results import RESULTS, Row, arguments, real_data, write_results, write_table
from vitprune.evaluation.accuracy import accuracy

ROOT = Path(__file__).parents[2]
DENSE_ALL, TOLERANCE = 81.1, 0.2

GOALS = (
    Goal("30 %", {"weight": 0.3}),
    Goal("50 %", {"weight": 0.5}, bound=75.0),
    Goal("60 %", {"weight": 0.6}, bound=64.0),
    Goal("75 %", {"weight": 0.75}, bound=20.0),
    Goal("2:4", {"weight": 0.5}, pattern="2:4", bound=56.0),
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
    """Measure every row and write the tables."""
    options = arguments(__doc__, {"note": ("", "a sentence for the page, such as which rows are older")})
    quick = options.quick
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
    all_images = accuracy(case.dense, [*case.held_out, *case.calibration])[0]["top1"]
    close = abs(all_images - DENSE_ALL) <= TOLERANCE
    if not quick:
        write_table(
            ROOT / "docs/results/oneshot.md",
            "One-shot pruning of DeiT-Tiny's weights, no training",
            f"{__doc__} {options.note}",
            ["method", *(goal.name for goal in goals)],
            [["dense", *([f"{case.top1:.1f}"] * len(goals))], *lines(done, entries, goals)],
        )
    dense = Row("dense, all 800 images", all_images, "top-1 %", f"{DENSE_ALL} +- {TOLERANCE}", close)
    write_results("oneshot", [dense, *rows(done, goals, case.top1, not quick)], quick)


if __name__ == "__main__":
    main()
