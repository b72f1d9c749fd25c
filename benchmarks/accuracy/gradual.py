"""Gradual pruning of DeiT-Tiny to 90 % with recovery: top-1 at 50, 60, 75, 80 and 90 %, all methods trained alike.

After each step, some batches of Imagenette's 3000 training images, AdamW, the rate falling from 2e-4 to 1e-5 as a
line anew after each step (cyclic), or as one cosine over the whole run; scores from 256 of the training images, taken
again from the current weights at each step, with score.damping 4e-6 (oneshot.md). Top-1 on Imagenette's validation
images, over all 1000 classes, after the last batch: no step is chosen by it. Needs VITPRUNE_REAL_DATA. Writes
benchmarks/results/gradual.json and docs/results/gradual.md, and notes each run that has ended.
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
from benchmarks.accuracy.torch_pruning import load_dense
from benchmarks.lib.deit_tiny import damped
from benchmarks.lib.results import RESULTS, Row, arguments, real_data, write_results, write_table
from vitprune import METHODS, PruneConfig, data
from vitprune.config.prune_config import Schedule
from vitprune.config.train_config import TrainConfig
from vitprune.data.loaders import batch_count, train_batches
from vitprune.pruning.prune import prune_cycles
from vitprune.training.distillation import classification
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.optimizers import OptimizerState, ScheduleSpan

ROOT = Path(__file__).parents[2]
SPARSITIES = (0.5, 0.6, 0.75, 0.8, 0.9)
RATES = {"cyclic": ("linear", "cycle"), "one cosine": ("cosine", "run")}


@dataclass(frozen=True)
class Budget:
    """Steps after each pruning step, images behind a score, and which share of the validation images is used."""

    steps: int
    scored: int = 256
    every: int = 2
    sparsities: tuple[float, ...] = SPARSITIES
    augment: str = "none"
    workers: int = 0
    batch: int = 32

    @property
    def per_epoch(self) -> int:
        """Steps that a pass over the training images has at most."""
        return batch_count(3000, self.batch)


@dataclass(frozen=True)
class Job:
    """One run: a method, how its rate falls, and what it may use."""

    method: str
    rate: str
    real: Path
    budget: Budget
    device: str


@dataclass(frozen=True)
class Point:
    """A run at one sparsity: the share of weights at zero, top-1 in percent, seconds of scoring and of training."""

    zeros: float
    top1: float
    scoring: float
    training: float


def main() -> None:
    """Run every method, and write the tables."""
    extra = {
        "methods": ("magnitude,woodfisher,ovit", "by name, those that there are"),
        "steps": (0, "batches after each pruning step; 0: 18 on a CPU, 470 on a GPU"),
    }
    asked, real = arguments(__doc__, extra), real_data()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    methods = [name for name in asked.methods.split(",") if name in METHODS]
    budget = Budget(asked.steps or 470, every=1, augment="light1", workers=8) if gpu else Budget(asked.steps or 18)
    if asked.quick:
        budget = Budget(3, 32, 10, (0.5, 0.9), budget.augment, budget.workers)
    jobs = [Job(name, "cyclic", real, budget, "cuda" if gpu else "cpu") for name in methods]
    again = jobs if gpu else jobs[-1:]  # a CPU has the time for one of them with the other rate: the last
    jobs += [replace(job, rate="one cosine") for job in again]
    found = runs(jobs, RESULTS / f"gradual{'-quick' * asked.quick}-notes.jsonl", 1 if gpu else 2)
    dense = top1_of(load_dense(real), real, budget.every)
    if not asked.quick:
        page(found, dense, budget)
    write_results("gradual", rows_of(found, dense, asked.quick), asked.quick)


def runs(jobs: Sequence[Job], notes: Path, processes: int) -> dict[Job, list[Point]]:
    """All runs, those that `notes` has of before among them: delete it to begin anew."""
    lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    made = [(one.pop("points"), one) for one in lines]
    found = {job: [Point(**point) for point in points] for job in jobs for points, one in made if one == named(job)}
    left = [job for job in jobs if job not in found]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        made_now = {pool.submit(pruned, job): job for job in left}
        for done in as_completed(made_now):
            job, points = made_now[done], done.result()
            found[job] = points
            with notes.open("a") as file:
                file.write(json.dumps(named(job) | {"points": [asdict(point) for point in points]}) + "\n")
    return {job: found[job] for job in jobs}


def named(job: Job) -> dict[str, str | int]:
    """What tells a run from the others."""
    return {"method": job.method, "rate": job.rate, "device": job.device, "steps": job.budget.steps}


def pruned(job: Job) -> list[Point]:
    """Prune a dense model step by step and recover it after each."""
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
        recover(model, job, table, FrozenZeros(cycle.zeroed, cycle.masks), cycle.number, memory)
        trained = time.perf_counter()
        weights = [model.get_parameter(group.name) for group in cycle.groups]
        zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
        points.append(Point(zeros, top1_of(model, job.real, budget.every), scored - start, trained - scored))
        start = time.perf_counter()
    return points


def calibration(job: Job) -> list[data.Batch]:
    """Training images for scores, one in so many, without augmentation."""
    table = images_of(job.real, "train", None, 3000 // job.budget.scored)
    batches = data.eval_batches(table, 32)
    return list(itertools.islice(batches, -(-job.budget.scored // 32)))


def recover(
    model: torch.nn.Module, job: Job, table: data.ImageTable, held: FrozenZeros, cycle: int, memory: OptimizerState
) -> None:
    """Train after a cycle, each with images and an order of its own."""
    budget, (decay, over) = job.budget, RATES[job.rate]
    seed, steps = 1000 * cycle, budget.steps
    epochs = -(-steps // budget.per_epoch)
    own = -(-steps // epochs)

    def batches(epoch: int) -> Iterator[data.Batch]:
        return itertools.islice(train_batches(table, budget.batch, seed, epoch, budget.workers), own)

    total = epochs * own
    spans = {"cycle": (0, total), "run": ((cycle - 1) * total, len(budget.sparsities) * total)}
    settings = {"lr": 2e-4, "min_lr": 1e-5, "decay": decay, "decay_over": over, "optimizer_state": "keep"}
    recipe = TrainConfig.model_validate({"epochs": epochs, "batch_size": budget.batch, "weight_decay": 0.03} | settings)
    span = ScheduleSpan(*spans[over], memory)
    train(classification(model, 0.1), batches, own, recipe, seed, lambda row: None, held, span=span)


def rows_of(found: dict[Job, list[Point]], dense: float, quick: bool) -> list[Row]:
    """Top-1, zeros and seconds of every run, and whether ovit is ahead of magnitude."""
    rows, mean = [Row("dense", dense, "top-1 %")], {}
    for job, points in found.items():
        for share, point in zip(job.budget.sparsities, points, strict=True):
            label = f"{job.method}, {job.rate}, {share:.0%}"
            off = abs(point.zeros - share)
            rows.append(Row(f"{label}: zeros", point.zeros, "of the weights", f"{share} +- 0.0001", off <= 1e-4))
            rows.append(Row(label, point.top1, "top-1 %"))
            rows.append(Row(f"{label}: scoring and training", point.scoring + point.training, "s"))
        mean[job.method, job.rate] = sum(point.top1 for point in points) / len(points)
    if ("ovit", "cyclic") in mean and ("magnitude", "cyclic") in mean:
        ahead = mean["ovit", "cyclic"] - mean["magnitude", "cyclic"]
        promise = (None, None) if quick else ("> 0", ahead > 0)
        rows.append(Row("ovit ahead of magnitude, mean over sparsities", ahead, "points", *promise))
    return rows


def page(found: dict[Job, list[Point]], dense: float, budget: Budget) -> None:
    """The document: a line per run."""
    header = ["method", "rate", *(f"{share:.0%}" for share in budget.sparsities), "scoring, s", "training, s"]
    cells: list[Sequence[str]] = [["dense", "", *[f"{dense:.1f}"] * len(budget.sparsities), "", ""]]
    for job, points in found.items():
        seconds = [f"{sum(p.scoring for p in points):.0f}", f"{sum(p.training for p in points):.0f}"]
        cells.append([job.method, job.rate, *(f"{point.top1:.1f}" for point in points), *seconds])
    about = f"{__doc__} Here: {budget.steps} steps of {budget.batch} images after each, augmentation {budget.augment},"
    about += f" every {budget.every}. validation image." if budget.every > 1 else " all validation images."
    write_table(ROOT / "docs/results/gradual.md", "Gradual pruning of DeiT-Tiny", about, header, cells)


if __name__ == "__main__":
    main()
