"""Residual channels of DeiT-Tiny removed one-shot, with and without a rotation of the residual stream; no training.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; all values on the same images, with a
standard error of about 1.6 points. `importance`: the basis of prune.rotate_residual. `energy`: the principal directions
of the stream after the norms, each norm with the same weight, as in SliceGPT. The layers that read the stream are
refitted, except in the row `no refit`. `+ correction`: norms and biases are corrected afterwards (prune.correct_norms).
The row without rotation is from benchmarks/accuracy/structured_oneshot.py.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/rotation.json and docs/results/rotation.md.
"""

import copy
import json
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.lib.deit_tiny import Setup, corrected, setup
from benchmarks.lib.results import RESULTS, Row, arguments, real_data, write_results, write_table
from vitprune import find_groups
from vitprune.architectures.stream_rotation import rotate_stream
from vitprune.criteria import DEFAULT_CONTEXT, Statistics
from vitprune.criteria.moments import collect_layer_moments
from vitprune.criteria.obs.stream import rotated, stream_basis, stream_readers
from vitprune.criteria.obs.units import unit_obs_update
from vitprune.evaluation.accuracy import accuracy
from vitprune.groups import shrink

ROOT = Path(__file__).parents[2]
REMOVED = {"10 %": 19, "20 %": 38, "30 %": 58}  # of 192 channels
GOAL = 75.0  # top-1 in % without 10 % of the channels


def main() -> None:
    """Measure every row and write the table."""
    quick = arguments(__doc__).quick
    real_data()
    case, start = setup(), time.process_time()
    model = rotated(case.dense, stream_basis(case.dense, case.calibration, DEFAULT_CONTEXT), case.calibration[0][0][:1])
    statistics = collect_layer_moments(model, stream_readers(model), {}, case.calibration, DEFAULT_CONTEXT, None)
    seconds = time.process_time() - start
    table: dict[str, dict[str, float]] = {}
    for name in ["10 %"] if quick else list(REMOVED):
        measure(case, table, "importance", name, pruned(model, statistics, REMOVED[name]))
    if not quick:
        measure(case, table, "importance, no refit", "10 %", pruned(model, None, REMOVED["10 %"]))
        turned, moments = by_energy(model, statistics)
        for name in ("10 %", "20 %"):
            measure(case, table, "energy", name, pruned(turned, moments, REMOVED[name]))
        for name in ("10 %", "20 %"):
            fixed = corrected(case, pruned(model, statistics, REMOVED[name]))
            measure(case, table, "importance + correction", name, fixed)
    write(case.top1, table, seconds, quick)


def pruned(model: nn.Module, statistics: Statistics | None, removed: int) -> nn.Module:
    """Return a copy without the last channels; the layers that read the stream are refitted if there are statistics."""
    result = copy.deepcopy(model)
    (group,) = find_groups(result, ["residual"])
    masks = {group.name: torch.arange(group.units) < group.units - removed}
    values = {} if statistics is None else unit_obs_update(result, [group], statistics)(masks)
    with torch.no_grad():
        for name, value in values.items():
            result.get_parameter(name).copy_(value)
    return shrink(result, [group], masks)


def by_energy(model: nn.Module, statistics: Statistics) -> tuple[nn.Module, Statistics]:
    """Return the model in the basis of the principal directions of its normalized stream, with its statistics."""
    sums = {name: value.sum(dim=0) for name, value in statistics.items()}
    energy = torch.stack([value[:-1, :-1] / value[-1, -1] for value in sums.values()]).sum(dim=0)
    basis = torch.linalg.eigh(energy).eigenvectors.flip(1)
    full = torch.block_diag(basis, torch.ones(1, 1, dtype=torch.float64))
    turned = {name: full.T @ value @ full for name, value in statistics.items()}
    return rotate_stream(copy.deepcopy(model), basis), turned


def measure(case: Setup, table: dict[str, dict[str, float]], row: str, column: str, model: nn.Module) -> None:
    """Evaluate a model and write its top-1 into the table."""
    table.setdefault(row, {})[column] = accuracy(model, case.held_out)[0]["top1"]
    print(row, column, table[row][column], flush=True)


def write(dense: float, table: dict[str, dict[str, float]], seconds: float, quick: bool) -> None:
    """Write the results file and the page."""
    rows = [Row("dense", dense, "top-1 %"), Row("rotation and statistics, CPU time of one thread", seconds, "s")]
    for label, cells in table.items():
        for name, value in cells.items():
            promised = (f">= {GOAL:g}", value >= GOAL) if (label, name) == ("importance", "10 %") else (None, None)
            rows.append(Row(f"{label}, {name} of residual", value, "top-1 %", *promised))
    if not quick:
        lines = [["dense", *[f"{dense:.1f}"] * len(REMOVED)], ["channel-taylor, no rotation", *unrotated()]]
        lines += [
            [label, *(f"{cells[name]:.1f}" if name in cells else "-" for name in REMOVED)]
            for label, cells in table.items()
        ]
        header = ["basis of the stream", *(f"{name} of residual" for name in REMOVED)]
        title = "Residual channels of DeiT-Tiny after a rotation of the stream, no training"
        write_table(ROOT / "docs/results/rotation.md", title, __doc__ or "", header, lines)
    write_results("rotation", rows, quick)


def unrotated() -> list[str]:
    """Return the top-1 of channel-taylor without rotation, from the results of structured_oneshot.py."""
    rows = {row["what"]: row["value"] for row in json.loads((RESULTS / "structured.json").read_text())}
    values = [rows.get(f"channel-taylor, {name} of residual") for name in REMOVED]
    return ["-" if value is None else f"{value:.1f}" for value in values]


if __name__ == "__main__":
    main()
