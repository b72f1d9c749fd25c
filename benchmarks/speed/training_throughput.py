"""Throughput of distillation: images per second and peak memory of `training.loop` and of a plain loop of timm's parts.

The student is distilled from DeiT-Small by its logits; weights are random, which does not affect time. Both loops get
the same batches from memory, AdamW, gradient clipping at 1, label smoothing 0.1, and bfloat16 on a GPU. They alternate
in one process, so that both see the same load of the machine. Medians over rounds; the ratio is taken per round. The
plain loop does not check its loss; ours stops before the step if it is not finite. "held" keeps half of the weights at
zero. Memory is the GPU's peak, or the process's on a CPU. Input pipeline: JPEG of 500 x 375 pixels, DeiT's
augmentation, one decoding process. Writes benchmarks/results/training.json and docs/results/training.md.
"""

import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import data, find_groups, zero
from vitprune.config.train_config import TrainConfig
from vitprune.training.distillation import logit_distillation
from vitprune.training.loop import FrozenZeros, train

ROOT = Path(__file__).parents[2]
STUDENTS = {"DeiT-Tiny": "deit_tiny_patch16_224", "DeiT-Small": "deit_small_patch16_224"}
TEACHER, LOOPS = "deit_small_patch16_224", ("ours", "plain", "held")
RATE, DECAY, SMOOTHING, CLIP = 1e-4, 0.05, 0.1, 1.0


@dataclass(frozen=True)
class Budget:
    """Device, batch size, timed steps, warm-up steps and rounds."""

    device: torch.device
    batch: int
    steps: int
    warm: int
    rounds: int

    @property
    def amp(self) -> bool:
        """Whether forward passes run in bfloat16."""
        return self.device.type == "cuda"


@dataclass
class Watch:
    """Yield batches to a loop and time the steps after warm-up."""

    budget: Budget
    seconds: float = 0.0
    batch: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((self.budget.batch, 3, 224, 224), generator=generator)
        self.batch = images, torch.arange(self.budget.batch) % 1000

    def epochs(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same batch for every step."""
        for number in range(self.budget.warm + self.budget.steps):
            if number == self.budget.warm:
                start = self._now()
            yield self.batch
        self.seconds = self._now() - start

    def _now(self) -> float:
        if self.budget.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Measured:
    """Images per second, and peak memory in MiB."""

    speed: float
    memory: float


def main() -> None:
    """Measure and write the tables."""
    extra = {"threads": (1, "CPU threads"), "rounds": (0, "runs of each loop; 0: 7, quick: 2")}
    options = arguments(__doc__, extra)
    torch.set_num_threads(options.threads)
    gpu = torch.cuda.is_available()
    sizes = (256, 30, 5) if gpu and not options.quick else (2, 2, 1) if options.quick else (8, 6, 1)
    budget = Budget(torch.device("cuda" if gpu else "cpu"), *sizes, options.rounds or (2 if options.quick else 7))
    names = ["DeiT-Tiny"] if options.quick else list(STUDENTS)
    results = {name: rounds_of(STUDENTS[name], budget) for name in names}
    decoding = decoded(32 if options.quick else 256)
    rows, cells = rows_of(results, decoding, options.quick)
    if not options.quick:
        about = f"{__doc__} Here: batches of {budget.batch}, {budget.steps} steps, {budget.rounds} rounds, "
        about += f"{options.threads} thread{'s' if options.threads > 1 else ''} of the CPU, one worker decodes "
        about += f"{decoding:.0f} images per second."
        header = [
            "student",
            "loop",
            "images per second",
            "of the plain loop",
            "peak memory, MiB",
            "decoding workers needed",
        ]
        write_table(ROOT / "docs/results/training.md", "Training with a teacher", about, header, cells)
    write_results("training", rows, options.quick)


def rounds_of(name: str, budget: Budget) -> dict[str, list[Measured]]:
    """Run every loop in every round, each round starting with another one."""
    results: dict[str, list[Measured]] = {loop: [] for loop in LOOPS}
    for number in range(budget.rounds):
        turn = number % len(LOOPS)
        for loop in (*LOOPS[turn:], *LOOPS[:turn]):
            results[loop].append(once(name, loop, budget))
    return results


def once(name: str, loop: str, budget: Budget) -> Measured:
    """Run one loop from fresh weights."""
    torch.manual_seed(0)
    student, teacher = (timm.create_model(model).to(budget.device) for model in (name, TEACHER))
    watch = Watch(budget)
    peak = peaks(budget.device)
    if loop == "plain":
        plain(student, teacher, watch, budget)
    else:
        ours(student, teacher, watch, budget, loop == "held")
    return Measured(budget.batch * budget.steps / watch.seconds, peak())


def ours(student: nn.Module, teacher: nn.Module, watch: Watch, budget: Budget, half: bool) -> None:
    """Run the library's training loop, with half of the weights kept at zero if `half`."""
    zeros = None
    if half:
        groups = find_groups(student, ["weight"])
        weights = {group.name: student.get_parameter(group.name).detach() for group in groups}
        zeros = FrozenZeros(groups, {key: weight.abs() > weight.abs().median() for key, weight in weights.items()})
        zero(student, groups, zeros.masks)
    recipe = TrainConfig(epochs=1, lr=RATE, weight_decay=DECAY, clip=CLIP, smoothing=SMOOTHING, amp=budget.amp)
    task = logit_distillation(student, teacher, 1.0, 1.0, SMOOTHING)
    train(task, watch.epochs, budget.warm + budget.steps, recipe, 0, lambda row: None, zeros)


def plain(student: nn.Module, teacher: nn.Module, watch: Watch, budget: Budget) -> None:
    """A minimal training loop with timm's task, optimizer and cosine schedule."""
    teacher.eval().requires_grad_(False)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    task = LogitDistillationTask(
        student, teacher, criterion, distill_loss_weight=1.0, task_loss_weight=1.0, verbose=False
    )
    task = task.to(budget.device).train()
    optimizer = create_optimizer_v2(student, "adamw", lr=RATE, weight_decay=DECAY)
    steps = budget.warm + budget.steps
    for step, (images, labels) in enumerate(watch.epochs(0)):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * RATE * (1 + math.cos(math.pi * step / steps))
        images, labels = images.to(budget.device), labels.to(budget.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(budget.device.type, torch.bfloat16, enabled=budget.amp):
            loss = task(images, labels)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()


def peaks(device: torch.device) -> Callable[[], float]:
    """Start tracking memory; return a function that gives the peak since then in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")

    def highest() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    return highest


def decoded(number: int) -> float:
    """Return the images per second that one process decodes and augments."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(8):
        coarse = Image.fromarray(generator.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    config = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    transform = data.transform(config | {"interpolation": "bicubic", "crop_pct": 0.9}, "deit")
    ids = tuple(map(str, range(number)))
    table = data.ImageTable(ids, torch.zeros(number, dtype=torch.int64), transform, lambda row: encoded[row % 8], None)
    start = time.perf_counter()
    images = sum(len(labels) for _, labels in data.train_batches(table, 8, 0, 0))
    return images / (time.perf_counter() - start)


def rows_of(
    results: dict[str, dict[str, list[Measured]]], decoding: float, quick: bool
) -> tuple[list[Row], list[Sequence[str]]]:
    """Return medians, and whether ours is as fast as the plain loop within the spread of the rounds."""
    rows, cells = [], list[Sequence[str]]()
    for student, loops in results.items():
        for loop in LOOPS:
            speed = statistics.median(one.speed for one in loops[loop])
            memory = max(one.memory for one in loops[loop])
            ratios = [one.speed / other.speed for one, other in zip(loops[loop], loops["plain"], strict=True)]
            ratio, runs = statistics.median(ratios), len(ratios)
            upper = statistics.quantiles(ratios, n=4)[2] if runs > 1 else ratio
            rows.append(Row(f"{student}, {loop}", speed, "images/s", runs=runs))
            rows.append(Row(f"{student}, {loop}: peak memory", memory, "MiB", runs=runs))
            if loop != "plain":
                promise = (
                    (">= 1, within the upper quartile", upper >= 1) if loop == "ours" and not quick else (None, None)
                )
                rows.append(Row(f"{student}, {loop} / plain", ratio, "of the plain images/s", *promise, runs))
            feeders = f"{math.ceil(speed / decoding)}"
            cells.append([student, loop, f"{speed:.1f}", f"{ratio:.3f}", f"{memory:.0f}", feeders])
    rows.append(Row("one worker: decode and augment", decoding, "images/s"))
    return rows, cells


if __name__ == "__main__":
    main()
