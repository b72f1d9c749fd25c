"""Gradual pruning of DeiT-Tiny to 90 % with fine-tuning: top-1 at 50, 60, 75, 80 and 90 %, equal training for all.

After each pruning step, some batches of Imagenette's 3000 training images, AdamW, learning rate from 2e-4 to 1e-5 with
linear decay after each step (cyclic), or one cosine over the whole run. Scores are computed again at each step from the
current weights and 256 training images, with score.damping 4e-6 (oneshot.md). Top-1 on Imagenette's validation images,
over all 1000 classes, after the last batch: no checkpoint is selected by it. Needs VITPRUNE_REAL_DATA. Writes
benchmarks/results/gradual.json and docs/results/gradual.md, and records each finished run.
"""

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.accuracy.recovery import images_of, top1_of
from benchmarks.lib.deit_tiny import damped, load_dense
from benchmarks.lib.results import RESULTS, Row, arguments, real_data, write_results, write_table
from vitprune import METHODS, PruneConfig, data
from vitprune.config.prune_config import Schedule
from vitprune.config.train_config import TrainConfig
from vitprune.data.loaders import batch_count, train_batches
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.training.distillation import classification
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.optimizers import OptimizerState, ScheduleSpan

ROOT = Path(__file__).parents[2]
SPARSITIES = (0.5, 0.6, 0.75, 0.8, 0.9)
RATES = {"cyclic": ("linear", "cycle"), "one cosine": ("cosine", "run")}


@dataclass(frozen=True)
class Budget:
    """Training steps after each pruning step, images for scores, and every n-th validation image."""

    steps: int
    scored: int = 256
    every: int = 2
    sparsities: tuple[float, ...] = SPARSITIES
    augment: str = "none"
    workers: int = 0
    batch: int = 32

    @property
    def per_epoch(self) -> int:
        """Largest number of steps of an epoch."""
        return batch_count(3000, self.batch)


@dataclass(frozen=True)
class Job:
    """One run: method, learning-rate schedule, data, budget and device."""

    method: str
    rate: str
    real: Path
    budget: Budget
    device: str


@dataclass(frozen=True)
class Point:
    """One sparsity of a run: fraction of zero weights, top-1 in percent, seconds of scoring and of training."""

    zeros: float
    top1: float
    scoring: float
    training: float


def main() -> None:
    """Run every method, and write the tables."""
    extra = {
        "methods": ("magnitude,woodfisher,ovit", "comma-separated; unknown names are ignored"),
        "steps": (0, "batches after each pruning step; 0: 18 on a CPU, 470 on a GPU"),
    }
    options, real = arguments(__doc__, extra), real_data()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    methods = [name for name in options.methods.split(",") if name in METHODS]
    budget = Budget(options.steps or 470, every=1, augment="light1", workers=8) if gpu else Budget(options.steps or 18)
    if options.quick:
        budget = Budget(3, 32, 10, (0.5, 0.9), budget.augment, budget.workers)
    jobs = [Job(name, "cyclic", real, budget, "cuda" if gpu else "cpu") for name in methods]
    repeated = jobs if gpu else jobs[-1:]  # on a CPU, the other schedule only for the last method
    jobs += [replace(job, rate="one cosine") for job in repeated]
    results = runs(jobs, RESULTS / f"gradual{'-quick' * options.quick}-notes.jsonl", 1 if gpu else 2)
    dense = top1_of(load_dense(real), real, budget.every)
    if not options.quick:
        page(results, dense, budget)
    write_results("gradual", rows_of(results, dense, options.quick), options.quick)


def runs(jobs: Sequence[Job], notes: Path, processes: int) -> dict[Job, list[Point]]:
    """Return the points of all runs. Finished runs are read from `notes`; delete the file to start over."""
    lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    recorded = [(line.pop("points"), line) for line in lines]
    results = {
        job: [Point(**point) for point in points] for job in jobs for points, key in recorded if key == run_key(job)
    }
    remaining = [job for job in jobs if job not in results]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(prune, job): job for job in remaining}
        for future in as_completed(futures):
            job, points = futures[future], future.result()
            results[job] = points
            with notes.open("a") as file:
                file.write(json.dumps(run_key(job) | {"points": [asdict(point) for point in points]}) + "\n")
    return {job: results[job] for job in jobs}


def run_key(job: Job) -> dict[str, str | int]:
    """Return the fields that identify a run."""
    return {"method": job.method, "rate": job.rate, "device": job.device, "steps": job.budget.steps}


def prune(job: Job) -> list[Point]:
    """Prune in cycles and fine-tune after each."""
    torch.set_num_threads(1)
    budget, model, memory = job.budget, load_dense(job.real).to(job.device), OptimizerState()
    table = images_of(job.real, "train", budget.augment)
    steps = Schedule(steps=list(budget.sparsities))
    plan = damped(
        PruneConfig(method=job.method, sparsity=budget.sparsities[-1], cycles=len(budget.sparsities), schedule=steps)
    )
    points: list[Point] = []
    start = time.perf_counter()
    for cycle in prune_cycles(model, plan, calibration(job)):
        scored = time.perf_counter()
        finetune(model, job, table, FrozenZeros(cycle.zeroed, cycle.masks), cycle.number, memory)
        trained = time.perf_counter()
        weights = [model.get_parameter(group.name) for group in cycle.groups]
        zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
        points.append(Point(zeros, top1_of(model, job.real, budget.every), scored - start, trained - scored))
        start = time.perf_counter()
    return points


def calibration(job: Job) -> list[data.Batch]:
    """Return equally spaced training images for scores, without augmentation."""
    table = images_of(job.real, "train", None, 3000 // job.budget.scored)
    batches = data.eval_batches(table, 32)
    return list(itertools.islice(batches, -(-job.budget.scored // 32)))


def finetune(
    model: torch.nn.Module, job: Job, table: data.ImageTable, zeros: FrozenZeros, cycle: int, memory: OptimizerState
) -> None:
    """Fine-tune after a cycle; each cycle has its own images and order."""
    budget, (decay, over) = job.budget, RATES[job.rate]
    seed, steps = 1000 * cycle, budget.steps
    epochs = -(-steps // budget.per_epoch)
    steps_per_epoch = -(-steps // epochs)

    def batches(epoch: int) -> Iterator[data.Batch]:
        return itertools.islice(train_batches(table, budget.batch, seed, epoch, budget.workers), steps_per_epoch)

    total = epochs * steps_per_epoch
    spans = {"cycle": (0, total), "run": ((cycle - 1) * total, len(budget.sparsities) * total)}
    settings = {"lr": 2e-4, "min_lr": 1e-5, "decay": decay, "decay_over": over, "optimizer_state": "keep"}
    recipe = TrainConfig.model_validate({"epochs": epochs, "batch_size": budget.batch, "weight_decay": 0.03} | settings)
    span = ScheduleSpan(*spans[over], memory)
    train(classification(model, 0.1), batches, steps_per_epoch, recipe, seed, lambda row: None, zeros, span=span)


def rows_of(results: dict[Job, list[Point]], dense: float, quick: bool) -> list[Row]:
    """Return top-1, zeros and seconds of every run, and the difference between ovit and magnitude."""
    rows, mean = [Row("dense", dense, "top-1 %")], {}
    for job, points in results.items():
        for share, point in zip(job.budget.sparsities, points, strict=True):
            label = f"{job.method}, {job.rate}, {share:.0%}"
            off = abs(point.zeros - share)
            rows.append(Row(f"{label}: zeros", point.zeros, "of the weights", f"{share} +- 0.0001", off <= 1e-4))
            rows.append(Row(label, point.top1, "top-1 %"))
            rows.append(Row(f"{label}: scoring and training", point.scoring + point.training, "s"))
        mean[job.method, job.rate] = sum(point.top1 for point in points) / len(points)
    if ("ovit", "cyclic") in mean and ("magnitude", "cyclic") in mean:
        gain = mean["ovit", "cyclic"] - mean["magnitude", "cyclic"]
        promise = (None, None) if quick else ("> 0", gain > 0)
        rows.append(Row("ovit minus magnitude, mean over sparsities", gain, "points", *promise))
    return rows


def page(results: dict[Job, list[Point]], dense: float, budget: Budget) -> None:
    """Write the page: one row per run."""
    header = ["method", "rate", *(f"{share:.0%}" for share in budget.sparsities), "scoring, s", "training, s"]
    cells: list[Sequence[str]] = [["dense", "", *[f"{dense:.1f}"] * len(budget.sparsities), "", ""]]
    for job, points in results.items():
        seconds = [f"{sum(p.scoring for p in points):.0f}", f"{sum(p.training for p in points):.0f}"]
        cells.append([job.method, job.rate, *(f"{point.top1:.1f}" for point in points), *seconds])
    about = f"{__doc__} Here: {budget.steps} steps of {budget.batch} images after each, augmentation {budget.augment},"
    about += f" one of {budget.every} validation images." if budget.every > 1 else " all validation images."
    write_table(ROOT / "docs/results/gradual.md", "Gradual pruning of DeiT-Tiny", about, header, cells)


if __name__ == "__main__":
    main()
