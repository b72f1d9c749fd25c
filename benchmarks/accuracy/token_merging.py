"""Token merging in DeiT-Tiny, alone and before the pruning of units, without training.

Evaluation on rows 0..599 of imagenet-val-800, standard error about 1.6 points; pruned rows are calibrated on rows
600..799. `merged`: tokens merged before every block but the first. Rows with a target are pruned by unit-obs to this
fraction of the dense model's MACs, with corrected norms. Speed-ups are ratios of the median times of the dense model
and of the model that merges tokens, run alternately: one image, one thread. Accuracies are recorded in
benchmarks/results/token_merging-notes.jsonl, so that an interrupted benchmark continues; delete the file to start over.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/token_merging.json and docs/results/token_merging.md.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.lib.deit_tiny import Setup, corrected, setup
from benchmarks.lib.results import Recorded, Row, arguments, real_data, write_results, write_table
from vitprune import count, merge_tokens, prune
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.engines import forward_call
from vitprune.evaluation.latency import alternating_times

ROOT = Path(__file__).parents[2]
ALONE = (4, 8, 12, 16, 20)
PRUNED = (("0.7", 0), ("0.7", 8), ("0.5", 0), ("0.5", 8), ("0.5", 12), ("0.5", 16))
ENGINES, RUNS = ("torch", "ort"), 25


@dataclass(frozen=True)
class Measured:
    """A model: target of MACs (empty: not pruned), tokens merged, fraction of MACs left, top-1 in %."""

    target: str
    merged: int
    macs: float
    top1: float


def main() -> None:
    """Measure every row and write the table."""
    quick = arguments(__doc__).quick
    real_data()
    case, done = setup(), Recorded("token_merging", Measured, quick)
    for target, merged in [("", 16)] if quick else [*(("", number) for number in ALONE), *PRUNED]:
        if (target, merged) not in {(row.target, row.merged) for row in done}:
            done.record(measured(case, target, merged))
    image, speeds = case.held_out[0][0][:1], dict[int, list[float]]()
    dense = [forward_call(case.dense, engine, image) for engine in ENGINES]
    for row in (row for row in done if not row.target):
        model = merge_tokens(copy.deepcopy(case.dense), row.merged)
        calls = [forward_call(model, engine, image) for engine in ENGINES]
        speeds[row.merged] = [speed_up(*pair) for pair in zip(dense, calls, strict=True)]
    rows, lines = [Row("dense", case.top1, "top-1 %")], [["dense", "0", "1.00", f"{case.top1:.1f}", "1.00", "1.00"]]
    for row in done:
        what = f"{row.target}x MACs, {row.merged} merged" if row.target else f"{row.merged} merged"
        ratios = [] if row.target else speeds[row.merged]
        rows += [Row(what, row.top1, "top-1 %"), Row(f"{what}, remaining MACs", row.macs, "of the MACs")]
        rows += [Row(f"{what}, {engine}", ratio, "x") for engine, ratio in zip(ENGINES, ratios, strict=False)]
        cells = [f"{row.target}x MACs" if row.target else "no pruning", str(row.merged), f"{row.macs:.2f}"]
        lines.append([*cells, f"{row.top1:.1f}", *([f"{ratio:.2f}" for ratio in ratios] or ["-", "-"])])
    if not quick:
        header = ["target", "merged", "MACs", "top-1", "speed-up, torch", "speed-up, onnxruntime"]
        title = "Token merging in DeiT-Tiny, no training"
        write_table(ROOT / "docs/results/token_merging.md", title, __doc__ or "", header, lines)
    write_results("token_merging", rows, quick)


def measured(case: Setup, target: str, merged: int) -> Measured:
    """Return the row of a model."""
    model = copy.deepcopy(case.dense)
    if target:
        settings = {"target": {"macs": float(target)}, "merge_tokens": merged or None}
        model = corrected(case, prune(model, "unit-obs", calibration=case.calibration, **settings).model)
    else:
        merge_tokens(model, merged)
    image = case.held_out[0][0][:1]
    macs = count(model, image).macs / count(case.dense, image).macs
    return Measured(target, merged, macs, accuracy(model, case.held_out)[0]["top1"])


def speed_up(dense: Callable[[], object], merging: Callable[[], object]) -> float:
    """Return the median time of a run of the dense model divided by that of the merging one; their runs alternate."""
    dense_times, merging_times = alternating_times([dense, merging], RUNS)
    return median(dense_times) / median(merging_times)


if __name__ == "__main__":
    main()
