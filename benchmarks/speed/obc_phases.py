"""CPU time of the phases of `obc` for all weights of DeiT-Tiny, 50 % removed: statistics, elimination, row solve.

Two implementations in one run, on the same statistics. Exact: one pass over the factor per weight, in float64, and one
Cholesky factor of all inputs per row, ridge and fold. Ours: rows of the factor computed ahead, in float32 where the
inputs allow it, and conjugate gradients on all rows of a layer. Seconds are CPU seconds of all threads (2 by default),
which other processes affect less than the elapsed time. Real weights and images with VITPRUNE_REAL_DATA (200 images,
rows 600..799 of imagenet-val-800), else random ones. The held-out error is that of the half of the images that was not
fitted, averaged over both halves, with the masks of our implementation, on the rows that select the ridge; the memory
is the peak during a phase minus the memory before it. With --every 3, elimination and row solve are those of blocks 2,
5, 8 and 11 (all blocks have the same shape), and three times as long for all. Writes benchmarks/results/obc_speed.json
and docs/results/obc_speed.md.
"""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.lib.deit_tiny import load_dense, load_images, split
from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import PruneConfig, ScoreConfig, find_groups, models, plan_for
from vitprune.criteria import Statistics
from vitprune.criteria.moments import collect_layer_moments
from vitprune.criteria.obs.greedy import eliminate_weights, loss_increments
from vitprune.criteria.obs.row_solve import RIDGE_ROWS, row_chunks, solve_restricted, solve_rows
from vitprune.criteria.obs.unit_elimination import RIDGES, add_ridge, fit_and_test_moments
from vitprune.groups import Group

ROOT = Path(__file__).parents[2]
SHARE, RIDGE, EQUAL = 0.5, 1e-3, 1e-3
SOLVE_FASTER, ALL_FASTER = 10.0, 5.0
Result = TypeVar("Result")
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Run both sides and write the tables."""
    options = arguments(
        __doc__,
        {"threads": (2, "threads of both sides"), "every": (1, "of how many blocks one is eliminated and solved")},
    )
    torch.set_num_threads(options.threads)
    model, batches = _data(16 if options.quick else 200)
    groups = [group for group in find_groups(model, ["weight"]) if not options.quick or group.name[7] == "0"]
    warm = torch.eye(70).double()[None]
    for kind in (None, torch.float32, torch.float64):
        eliminate_weights(warm, torch.rand(1, 70).double(), ahead=kind)  # compiles
    statistics, seconds, peak = measured(lambda: _statistics(model, groups, batches))
    number = sum(len(labels) for _, labels in batches)
    some = [group for group in groups if (int(group.name.split(".")[1]) + 1) % options.every == 0]
    layers = {group.name: _layer(model, group, statistics, number) for group in some}
    results = [Row("statistics", seconds, "CPU s"), Row("statistics, peak memory", peak / 2**20, "MiB")]
    scores, exact, results = _compare(
        results, "elimination", lambda: _eliminated(layers, None), lambda: _eliminated(layers, torch.float32)
    )
    masks, reference = _masks(scores), _masks(exact)
    differing = sum(int((masks[name] != reference[name]).sum()) for name in masks)
    ours, direct, results = _compare(
        results, "row solve", lambda: _solved(layers, masks, full_solve), lambda: _solved(layers, masks, solve_rows)
    )
    results += _quality(layers, masks, ours, direct)
    results.append(Row("masks that differ, 50 %", differing / sum(mask.numel() for mask in masks.values()), "of all"))
    results += _ratios({row.what: row.value for row in results}, options.every, options.quick)
    if not options.quick:
        cells = [[row.what, f"{row.value:.4g}", row.unit, row.target or ""] for row in results]
        header = ["what", "value", "unit", "goal"]
        write_table(ROOT / "docs/results/obc_speed.md", "Speed of obc by phase", __doc__ or "", header, cells)
    write_results("obc_speed", results, options.quick)


def full_solve(rows: Tensor, halves: Tensor, keep: Tensor, constant: bool, _: str) -> Tensor:
    """Solve the rows as `solve_rows` does, with a Cholesky factor of all inputs for every row, ridge and fold."""
    keep_inputs = torch.cat([keep, torch.full_like(keep[:, :1], constant)], dim=1)
    dense = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)
    sample = torch.arange(0, len(rows), max(1, len(rows) // RIDGE_ROWS))
    errors = []
    for ridge in RIDGES:
        errors.append(0.0)
        for fit, test in fit_and_test_moments(halves):
            change = _padded(dense[sample], add_ridge(fit, ridge), keep_inputs[sample]) - dense[sample]
            errors[-1] += float(((change @ test) * change).sum()) / float(test[-1, -1])
    return _padded(dense, add_ridge(halves.sum(dim=0), RIDGES[int(torch.tensor(errors).argmin())]), keep_inputs)


def _padded(dense: Tensor, damped: Tensor, keep: Tensor) -> Tensor:
    """Solve the rows with the identity at removed inputs."""
    result = []
    for part in row_chunks(len(dense), damped.shape[-1], 1 << 28):
        weights = keep[part].to(damped.dtype)
        matrices = damped * weights[:, :, None] * weights[:, None, :] + torch.diag_embed(1 - weights)
        targets = (dense[part] @ damped) * weights
        result.append(torch.cholesky_solve(targets[..., None], torch.linalg.cholesky_ex(matrices)[0])[..., 0])
    return torch.cat(result)


Layer = tuple[Tensor, Tensor, Tensor]  # rows, their weights in the loss, second moments per fold


def _data(images: int) -> tuple[nn.Module, Batches]:
    folder = os.environ.get("VITPRUNE_REAL_DATA")
    if folder:
        dense = load_dense(Path(folder))
        calibration = split(*load_images(Path(folder) / "imagenet-val-800.parquet", dense))[0]
        return dense, [(batch[:images], labels[:images]) for batch, labels in calibration[: -(-images // 50)]]
    torch.manual_seed(0)
    sizes = [min(50, images)] * -(-images // 50)
    pictures = [(torch.randn(size, 3, 224, 224), torch.zeros(size).long()) for size in sizes]
    return models.create("deit_tiny_patch16_224").eval(), pictures


def _statistics(model: nn.Module, groups: list[Group], batches: Batches) -> Statistics:
    context = plan_for(PruneConfig(method="obc", sparsity={"weight": SHARE}), ScoreConfig()).context(0)
    return collect_layer_moments(model, [_path(group) for group in groups], {}, batches, context, "metric_diagonal")


def _path(group: Group) -> str:
    return group.slices[0].param.removesuffix(".weight")


def _layer(model: nn.Module, group: Group, statistics: Statistics, images: int) -> Layer:
    rows = model.get_parameter(group.slices[0].param).detach().double().flatten(1)
    return rows, statistics[f"{_path(group)}/metric_diagonal"] / images, statistics[f"{_path(group)}/inputs"]


def _eliminated(layers: Mapping[str, Layer], ahead: torch.dtype | None) -> dict[str, Tensor]:
    """Scores of all weights, by the steps of `obc`."""
    result = {}
    for name, (rows, grad_sq, halves) in layers.items():
        damped = add_ridge(halves.sum(dim=0), RIDGE) / halves[:, -1, -1].sum()
        inverse = torch.linalg.inv(damped[:-1, :-1] - damped[:-1, -1:] @ damped[-1:, :-1])
        scaled = rows * grad_sq.sqrt()[:, None]
        chunks = row_chunks(len(rows), rows.shape[1], 1 << 30)
        losses = [
            eliminate_weights(inverse.expand(len(scaled[part]), -1, -1), scaled[part], ahead=ahead) for part in chunks
        ]
        result[name] = loss_increments(torch.cat(losses))
    return result


def _masks(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove half of all weights, those of least score."""
    every = torch.cat([score.flatten() for score in scores.values()])
    limit = every.kthvalue(int(SHARE * len(every))).values
    return {name: score > limit for name, score in scores.items()}


def _solved(layers: Mapping[str, Layer], masks: Mapping[str, Tensor], how: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {name: how(rows, halves, masks[name], True, name) for name, (rows, _, halves) in layers.items()}


def _compare(
    results: list[Row], phase: str, exact: Callable[[], dict[str, Tensor]], ours: Callable[[], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Row]]:
    """Run both sides of a phase; return ours, exact, and the rows with those of the phase."""
    fast, seconds, peak = measured(ours)
    slow, before, heavy = measured(exact)
    return (
        fast,
        slow,
        [
            *results,
            Row(f"{phase}, exact", before, "CPU s"),
            Row(f"{phase}, ours", seconds, "CPU s"),
            Row(f"{phase}, exact, peak memory", heavy / 2**20, "MiB"),
            Row(f"{phase}, ours, peak memory", peak / 2**20, "MiB"),
        ],
    )


def _quality(
    layers: Mapping[str, Layer], masks: Mapping[str, Tensor], ours: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> list[Row]:
    """Nats of both solutions on all images, and the largest relative difference of held-out errors of a layer."""
    nats, worst = [0.0, 0.0], 0.0
    for name, (rows, grad_sq, halves) in layers.items():
        dense = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)
        for side, solution in enumerate((ours[name], exact[name])):
            change, total = solution - dense, halves.sum(dim=0)
            nats[side] += float((((change @ total) * change).sum(dim=1) * grad_sq).sum() / total[-1, -1] / 2)
        some = torch.arange(0, len(rows), max(1, len(rows) // RIDGE_ROWS))
        kept = torch.cat([masks[name], torch.ones_like(masks[name][:, :1])], dim=1)[some]
        for fit, test in fit_and_test_moments(halves):
            changes = [
                solve_restricted(dense[some], add_ridge(fit, RIDGE), kept) - dense[some],
                _padded(dense[some], add_ridge(fit, RIDGE), kept) - dense[some],
            ]
            errors = [float(((change @ test) * change).sum()) for change in changes]
            worst = max(worst, abs(errors[0] / errors[1] - 1))
    difference = abs(nats[0] / nats[1] - 1)
    return [
        Row("nats after the row solve, exact", nats[1], "nats"),
        Row("nats after the row solve, ours", nats[0], "nats", f"{EQUAL:g} relative", difference <= EQUAL),
        Row("held-out error, largest difference of a layer", worst, "relative", f"<= {EQUAL:g}", worst <= EQUAL),
    ]


def _ratios(value: Mapping[str, float], every: int, quick: bool) -> list[Row]:
    """Return how much faster ours is, for all blocks; goals are not promises, so nothing fails."""
    sides = [
        value["statistics"] + every * (value[f"elimination, {side}"] + value[f"row solve, {side}"])
        for side in ("exact", "ours")
    ]
    totals = [
        Row(f"all phases of all blocks, {side}", value, "CPU s")
        for side, value in zip(("exact", "ours"), sides, strict=True)
    ]
    goals = [None, None, None] if quick else [None, f">= {SOLVE_FASTER:g}", f">= {ALL_FASTER:g}"]
    ratios = [value[f"{phase}, exact"] / value[f"{phase}, ours"] for phase in ("elimination", "row solve")]
    names = ("elimination, exact / ours", "row solve, exact / ours", "all phases, exact / ours")
    return totals + [
        Row(name, ratio, "x", goal)
        for name, ratio, goal in zip(names, [*ratios, sides[0] / sides[1]], goals, strict=True)
    ]


def measured(work: Callable[[], Result]) -> tuple[Result, float, int]:
    """Return the result of a call, its CPU seconds, and its peak memory above the memory before, in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _resident("VmRSS"), time.process_time()
    result = work()
    return result, time.process_time() - start, _resident("VmHWM") - before


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


if __name__ == "__main__":
    main()
