"""Distillation of DeiT-Tiny at 0.5x MACs: pruned by vitprune, and by Torch-Pruning at equal MACs.

Both prune in one shot on rows 600..799 of imagenet-val-800; Torch-Pruning with its setting of highest top-1 on these
rows (benchmarks/accuracy/torch_pruning.py). Then both pruned models are trained with the same seeds and batches:
Imagenette's 3000 training images, the dense model as the teacher, AdamW. Top-1 on Imagenette's 1000 validation images,
over all 1000 classes. Needs VITPRUNE_REAL_DATA and Torch-Pruning. Writes benchmarks/results/recovery.json and
docs/results/recovery.md.
"""

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from benchmarks.accuracy import torch_pruning
from benchmarks.lib.deit_tiny import Batches, load_dense, load_images, split
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, data, models, plan_for
from vitprune.config.train_config import TrainConfig
from vitprune.data.loaders import ImageTable, batch_count, eval_batches, train_batches
from vitprune.data.sources import Source
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.training.distillation import logit_distillation
from vitprune.training.loop import train

ROOT = Path(__file__).parents[2]
MACS, EQUAL = 0.5, 0.01


@dataclass(frozen=True)
class Budget:
    """Training of one pruned model, seeds, and every n-th validation image."""

    epochs: int
    steps: int
    seeds: int = 3
    every: int = 1
    batch: int = 32
    lr: float = 5e-4

    @property
    def recipe(self) -> TrainConfig:
        """Settings of the training loop."""
        return TrainConfig(epochs=self.epochs, batch_size=self.batch, lr=self.lr, warmup_epochs=0.1)


@dataclass(frozen=True)
class Job:
    """One pruned model, saved in a directory, and a seed."""

    pruned: Path
    real: Path
    seed: int
    budget: Budget
    device: str


@dataclass(frozen=True)
class ToolResult:
    """Pruned model of one tool: method, cost relative to the dense model, top-1 before and after training."""

    name: str
    method: str
    params: float
    macs: float
    before: float = 0.0
    after: tuple[float, ...] = ()
    speed: float = 0.0


def main() -> None:
    """Prune with both tools, train all copies, and write the tables."""
    extra = {
        "epochs": (1, "passes over the training images"),
        "steps": (75, "largest number of steps per epoch; 94 cover all images"),
        "method": ("unit-obs", "method of vitprune"),
    }
    options, real = arguments(__doc__, extra), real_data()
    torch_pruning.library()
    torch.set_num_threads(1)
    steps = min(options.steps, batch_count(len(images_of(real, "train")), Budget.batch))
    budget = Budget(1, 6, 1, 10) if options.quick else Budget(options.epochs, steps)
    with tempfile.TemporaryDirectory(prefix="vitprune-recovery-") as folder:
        results = distil_all(prune_both(real, Path(folder), options.method, options.quick), real, Path(folder), budget)
    dense = top1_of(load_dense(real), real, budget.every)
    if not options.quick:
        page(results, dense, budget)
    write_results("recovery", rows_of(results, dense, options.quick), options.quick)


def distil_all(results: Sequence[ToolResult], real: Path, folder: Path, budget: Budget) -> list[ToolResult]:
    """Return both results with top-1 before and after training; on a CPU in two processes of one thread."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seeds = range(budget.seeds)
    jobs = [Job(folder / side.name, real, seed, budget, device) for seed in seeds for side in results]
    with ProcessPoolExecutor(1 if device == "cuda" else 2, multiprocessing.get_context("spawn")) as pool:
        before = list(pool.map(evaluate_untrained, jobs[: len(results)]))
        after = list(pool.map(distil, jobs))
    sides = []
    for index, side in enumerate(results):
        seeds_after = after[index :: len(results)]
        top1, speed = tuple(top1 for top1, _ in seeds_after), mean(speed for _, speed in seeds_after)
        sides.append(replace(side, before=before[index], after=top1, speed=speed))
    return sides


def prune_both(real: Path, folder: Path, method: str, quick: bool) -> list[ToolResult]:
    """Save both pruned models; the target of vitprune is the MACs that Torch-Pruning reached."""
    dense = load_dense(real)
    calibration = split(*load_images(real / "imagenet-val-800.parquet", dense))[0][: 1 if quick else None]
    image, dense_cost = calibration[0][0][:1], count(dense, calibration[0][0])
    setup, rival = rival_of(dense, calibration, quick)
    target = {"macs": count(rival, image).macs / dense_cost.macs}
    ours = load_dense(real)
    for _ in prune_cycles(ours, plan_for(PruneConfig(method=method, target=target)), calibration):
        pass
    sides = []
    for name, about, model in (("vitprune", method, ours), ("Torch-Pruning", setup, rival)):
        models.save(model, folder / name)
        cost = count(model, image)
        sides.append(ToolResult(name, about, cost.params / dense_cost.params, cost.macs / dense_cost.macs))
    return sides


def rival_of(dense: nn.Module, calibration: Batches, quick: bool) -> tuple[str, nn.Module]:
    """Return Torch-Pruning's setting of highest top-1 on calibration images, and its model; quick: one setting."""
    goal, gradients = torch_pruning.Goal(macs=MACS), torch_pruning.mean_gradients(dense, calibration)
    if quick:
        return str(goal.setups[0]), torch_pruning.torch_pruning_case(dense, gradients, goal.setups[0], goal)
    best, model = torch_pruning.rank_setups(dense, gradients, goal, calibration)[0]
    return str(best.setup), model


def images_of(real: Path, split: str, augment: str | None = None, every: int = 1) -> ImageTable:
    """Return every n-th of Imagenette's train or val images, transformed by the model's config or a preset."""
    name = {"train": "imagenette-train-3000.parquet", "val": "imagenette-val-1000.parquet"}[split]
    source = data.open_source(f"parquet:{real / name}")
    ids = tuple(source.ids)[::every]
    transform = data.transform(data.data_config(models.create("deit_tiny_patch16_224")), augment)
    return ImageTable(ids, torch.tensor(source.labels)[::every], transform, partial(read_row, source, ids), None)


def read_row(source: Source, ids: tuple[str, ...], row: int) -> bytes:
    """Return the encoded bytes of an image."""
    return source.read(ids[row])


def top1_of(model: nn.Module, real: Path, every: int) -> float:
    """Return top-1 in percent on every n-th validation image."""
    return accuracy(model, eval_batches(images_of(real, "val", every=every), 50))[0]["top1"]


def evaluate_untrained(job: Job) -> float:
    """Return top-1 of a pruned model before training."""
    torch.set_num_threads(1)
    return top1_of(models.load(job.pruned).to(job.device), job.real, job.budget.every)


def distil(job: Job) -> tuple[float, float]:
    """Distil a pruned model; return its top-1, and the images per second of the training."""
    torch.set_num_threads(1)
    budget = job.budget
    table = images_of(job.real, "train", "none" if budget.epochs == 1 else "light")
    workers = 0 if budget.epochs == 1 else 8

    def epochs(epoch: int) -> Iterator[data.Batch]:
        return itertools.islice(train_batches(table, budget.batch, job.seed, epoch, workers), budget.steps)

    student = models.load(job.pruned).to(job.device)
    task = logit_distillation(student, load_dense(job.real), 1.0, 1.0, 0.0)
    start = time.perf_counter()
    train(task, epochs, budget.steps, budget.recipe, job.seed, lambda row: None)
    speed = budget.epochs * budget.steps * budget.batch / (time.perf_counter() - start)
    return top1_of(student, job.real, budget.every), speed


def rows_of(results: Sequence[ToolResult], dense: float, quick: bool) -> list[Row]:
    """Return top-1 of both tools before and after training, the difference in MACs, and the gain of vitprune."""
    rows = [Row("dense", dense, "top-1 %")]
    ours, rival = results
    for side in results:
        label = f"{side.name} ({side.method})"
        rows += [Row(f"{label}: MACs", side.macs, "of dense"), Row(f"{label}: parameters", side.params, "of dense")]
        rows.append(Row(f"{label}: training", side.speed, "images/s of a process"))
        rows.append(Row(f"{label}: before", side.before, "top-1 %"))
        rows += [Row(f"{label}: after, seed {seed}", top1, "top-1 %") for seed, top1 in enumerate(side.after)]
    difference = abs(ours.macs / rival.macs - 1)
    rows.append(Row("difference in MACs", difference, "of Torch-Pruning's", f"<= {EQUAL}", difference <= EQUAL))
    gain = mean(ours.after) - mean(rival.after)
    promise = (None, None) if quick else ("> 0", gain > 0)
    return [*rows, Row("vitprune minus Torch-Pruning after training, mean", gain, "points", *promise, len(ours.after))]


def page(results: Sequence[ToolResult], dense: float, budget: Budget) -> None:
    """Write the page: one row per tool."""
    header = ["pruned by", "method", "params", "MACs", "before, top-1 %", "after, per seed", "mean", "spread"]
    cells = [["dense", "", "1.00x", "1.000x", f"{dense:.1f}", "", "", ""]]
    for side in results:
        after = ", ".join(f"{top1:.1f}" for top1 in side.after)
        shares = [f"{side.params:.2f}x", f"{side.macs:.3f}x", f"{side.before:.1f}", after]
        cells.append([side.name, side.method, *shares, f"{mean(side.after):.2f}", f"{stdev(side.after):.2f}"])
    about = f"{__doc__} Training: {budget.epochs} x {budget.steps} steps of {budget.batch} images, "
    about += f"learning rate {budget.lr:g}."
    about += " Spread: standard deviation over seeds."
    title = "Distillation of DeiT-Tiny at 0.5x MACs"
    write_table(ROOT / "docs/results/recovery.md", title, about, header, cells)


if __name__ == "__main__":
    main()
