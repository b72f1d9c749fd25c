"""Recovery of a halved DeiT-Tiny by distillation: pruned by this library, and by Torch-Pruning at equal MACs.

Both prune in one shot on rows 600..799 of imagenet-val-800; of Torch-Pruning, the set-up of highest top-1 there
(benchmarks/accuracy/torch_pruning.py).
The same training for both then, with the same seeds and batches: Imagenette's 3000 training
images, the dense model as the teacher, AdamW. Top-1 on Imagenette's 1000 validation images, over all 1000 classes.
Needs VITPRUNE_REAL_DATA and Torch-Pruning. Writes benchmarks/results/recovery.json and docs/results/recovery.md.
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
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, data, models, plan_for
from vitprune.config.train_config import TrainConfig
from vitprune.data.loaders import ImageTable, batch_count, eval_batches, train_batches
from vitprune.data.sources import Source
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.pruning.prune import prune_cycles
from vitprune.training.distillation import logit_distillation
from vitprune.training.loop import train

ROOT = Path(__file__).parents[2]
MACS, EQUAL = 0.5, 0.01


@dataclass(frozen=True)
class Budget:
    """Training of one pruned model, seeds, and which share of the validation images (every n-th) is used."""

    epochs: int
    steps: int
    seeds: int = 3
    every: int = 1
    batch: int = 32
    lr: float = 5e-4

    @property
    def recipe(self) -> TrainConfig:
        """As the training loop takes it."""
        return TrainConfig(epochs=self.epochs, batch_size=self.batch, lr=self.lr, warmup_epochs=0.1)


@dataclass(frozen=True)
class Job:
    """One pruned model, saved in a folder, and a seed."""

    pruned: Path
    real: Path
    seed: int
    budget: Budget
    device: str


@dataclass(frozen=True)
class Side:
    """One tool's pruned model: what pruned it, what is left of the dense one, top-1 before and after training."""

    name: str
    method: str
    params: float
    macs: float
    before: float = 0.0
    after: tuple[float, ...] = ()
    speed: float = 0.0


def main() -> None:
    """Prune by both, train all copies, and write the tables."""
    extra = {
        "epochs": (1, "passes over the training images"),
        "steps": (75, "steps of an epoch, at most; 94 see all images"),
        "method": ("unit-obs", "this library's method"),
    }
    asked, real = arguments(__doc__, extra), real_data()
    torch_pruning.library()
    torch.set_num_threads(1)
    steps = min(asked.steps, batch_count(len(images_of(real, "train")), Budget.batch))
    budget = Budget(1, 6, 1, 10) if asked.quick else Budget(asked.epochs, steps)
    with tempfile.TemporaryDirectory(prefix="vitprune-recovery-") as folder:
        found = recovered(prune_both(real, Path(folder), asked.method, asked.quick), real, Path(folder), budget)
    dense = top1_of(torch_pruning.load_dense(real), real, budget.every)
    if not asked.quick:
        page(found, dense, budget)
    write_results("recovery", rows_of(found, dense, asked.quick), asked.quick)


def recovered(found: Sequence[Side], real: Path, folder: Path, budget: Budget) -> list[Side]:
    """Both sides with top-1 before and after; on a CPU, two processes of one thread share the work."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seeds = range(budget.seeds)
    jobs = [Job(folder / side.name, real, seed, budget, device) for seed in seeds for side in found]
    with ProcessPoolExecutor(1 if device == "cuda" else 2, multiprocessing.get_context("spawn")) as pool:
        before = list(pool.map(untrained, jobs[: len(found)]))
        after = list(pool.map(trained, jobs))
    sides = []
    for place, side in enumerate(found):
        own = after[place :: len(found)]
        top1, speed = tuple(top1 for top1, _ in own), mean(speed for _, speed in own)
        sides.append(replace(side, before=before[place], after=top1, speed=speed))
    return sides


def prune_both(real: Path, folder: Path, method: str, quick: bool) -> list[Side]:
    """Save both pruned models; this library aims at the MACs that Torch-Pruning reached."""
    dense = torch_pruning.load_dense(real)
    calibration = torch_pruning.split(real, dense)[0][: 1 if quick else None]
    image, whole = calibration[0][0][:1], count(dense, calibration[0][0])
    setup, rival = rival_of(dense, calibration, quick)
    target = {"macs": count(rival, image).macs / whole.macs}
    own = torch_pruning.load_dense(real)
    for _ in prune_cycles(own, plan_for(PruneConfig(method=method, target=target)), calibration):
        pass
    sides = []
    for name, about, model in (("vitprune", method, own), ("Torch-Pruning", setup, rival)):
        models.save(model, folder / name)
        cost = count(model, image)
        sides.append(Side(name, about, cost.params / whole.params, cost.macs / whole.macs))
    return sides


def rival_of(dense: nn.Module, calibration: torch_pruning.Batches, quick: bool) -> tuple[str, nn.Module]:
    """Torch-Pruning's set-up of highest top-1 on calibration images, and its model; the quick form tries one."""
    goal, gradients = torch_pruning.Goal(macs=MACS), torch_pruning.slopes(dense, calibration)
    if quick:
        return str(goal.setups[0]), torch_pruning.torch_pruning_case(dense, gradients, goal.setups[0], goal)
    found, model = torch_pruning.screened(dense, gradients, goal, calibration)[0]
    return str(found.setup), model


def images_of(real: Path, split: str, augment: str | None = None, every: int = 1) -> ImageTable:
    """Every n-th of Imagenette's train or val images, prepared as the model's config or a preset says."""
    name = {"train": "imagenette-train-3000.parquet", "val": "imagenette-val-1000.parquet"}[split]
    source = data.open_source(f"parquet:{real / name}")
    ids = tuple(source.ids)[::every]
    transform = data.transform(data.data_config(models.create("deit_tiny_patch16_224")), augment)
    return ImageTable(ids, torch.tensor(source.labels)[::every], transform, partial(read_row, source, ids), None)


def read_row(source: Source, ids: tuple[str, ...], row: int) -> bytes:
    """Encoded bytes of the row-th image."""
    return source.read(ids[row])


def top1_of(model: nn.Module, real: Path, every: int) -> float:
    """Top-1 in percent on every n-th validation image."""
    return accuracy(model, eval_batches(images_of(real, "val", every=every), 50))[0]["top1"]


def untrained(job: Job) -> float:
    """Top-1 of a pruned model as it is."""
    torch.set_num_threads(1)
    return top1_of(models.load(job.pruned).to(job.device), job.real, job.budget.every)


def trained(job: Job) -> tuple[float, float]:
    """Top-1 of a pruned model after the dense model has taught it, and images per second of the training."""
    torch.set_num_threads(1)
    budget = job.budget
    table = images_of(job.real, "train", "none" if budget.epochs == 1 else "light")
    workers = 0 if budget.epochs == 1 else 8

    def epochs(epoch: int) -> Iterator[data.Batch]:
        return itertools.islice(train_batches(table, budget.batch, job.seed, epoch, workers), budget.steps)

    student = models.load(job.pruned).to(job.device)
    task = logit_distillation(student, torch_pruning.load_dense(job.real), 1.0, 1.0, 0.0)
    start = time.perf_counter()
    train(task, epochs, budget.steps, budget.recipe, job.seed, lambda row: None)
    speed = budget.epochs * budget.steps * budget.batch / (time.perf_counter() - start)
    return top1_of(student, job.real, budget.every), speed


def rows_of(found: Sequence[Side], dense: float, quick: bool) -> list[Row]:
    """Before and after of both sides, every seed, and whether MACs are equal and this library is ahead."""
    rows = [Row("dense", dense, "top-1 %")]
    own, rival = found
    for side in found:
        label = f"{side.name} ({side.method})"
        rows += [Row(f"{label}: MACs", side.macs, "of dense"), Row(f"{label}: parameters", side.params, "of dense")]
        rows.append(Row(f"{label}: training", side.speed, "images/s of a process"))
        rows.append(Row(f"{label}: before", side.before, "top-1 %"))
        rows += [Row(f"{label}: after, seed {seed}", top1, "top-1 %") for seed, top1 in enumerate(side.after)]
    apart = abs(own.macs / rival.macs - 1)
    rows.append(Row("difference in MACs", apart, "of Torch-Pruning's", f"<= {EQUAL}", apart <= EQUAL))
    ahead = mean(own.after) - mean(rival.after)
    promise = (None, None) if quick else ("> 0", ahead > 0)
    return [*rows, Row("ahead of Torch-Pruning after training, mean", ahead, "points", *promise, len(own.after))]


def page(found: Sequence[Side], dense: float, budget: Budget) -> None:
    """The document: a line per side."""
    header = ["pruned by", "method", "params", "MACs", "before, top-1 %", "after, each seed", "mean", "spread"]
    cells = [["dense", "", "1.00x", "1.000x", f"{dense:.1f}", "", "", ""]]
    for side in found:
        after = ", ".join(f"{top1:.1f}" for top1 in side.after)
        shares = [f"{side.params:.2f}x", f"{side.macs:.3f}x", f"{side.before:.1f}", after]
        cells.append([side.name, side.method, *shares, f"{mean(side.after):.2f}", f"{stdev(side.after):.2f}"])
    about = f"{__doc__} Training: {budget.epochs} x {budget.steps} steps of {budget.batch} images, rate {budget.lr:g}."
    about += " Spread: the standard deviation over seeds."
    title = "Recovery of a halved DeiT-Tiny"
    write_table(ROOT / "docs/results/recovery.md", title, about, header, cells)


if __name__ == "__main__":
    main()
