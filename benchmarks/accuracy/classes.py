"""Pruning of DeiT-Tiny for ten of its 1,000 classes, with and without `prune.classes`.

The classes are those of Imagenette. `unit-obs` without training; 200 calibration images: of all classes (rows 600..799
of imagenet-val-800) or of the ten (imagenette-train-3000, 20 per class). Evaluation on the first images of every class
of imagenette-val-1000, by the largest of the ten logits; the other 990 logits of a model with all outputs are left out.
Most images of Imagenette were in DeiT's training set. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/classes.json
and docs/results/classes.md.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.deit_tiny import load_dense, load_images, split
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, ScoreConfig, plan_for
from vitprune.architectures.classifier import keep_classes
from vitprune.config.prune_config import Kind
from vitprune.data.class_subset import images_of_classes
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.pruning.cycle_masks import cycle_state, groups_for, select_cycle_masks
from vitprune.pruning.preparation import prepared
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.runtime.kept_classes import kept_classes

ROOT = Path(__file__).parents[2]
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
FRACTIONS = (0.5, 0.35)
KINDS: list[Kind] = ["ffn", "attention"]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Variant:
    """Images of the calibration and whether the classes are given."""

    label: str
    calibration: Batches
    classes: list[int] | None


def main() -> None:
    """Prune with every variant to every fraction of the MACs, and write the table."""
    options = arguments(
        __doc__, {"images": (1000, "images of the evaluation"), "threads": (1, "threads of one process")}
    )
    torch.set_num_threads(options.threads)
    folder = real_data()
    dense = load_dense(folder)
    evaluated, per_class = (20, 1) if options.quick else (options.images, 20)
    ten = balanced(*load_images(folder / "imagenette-train-3000.parquet", dense), per_class)
    held_out = balanced(*load_images(folder / "imagenette-val-1000.parquet", dense), evaluated // len(IMAGENETTE))
    every = ten if options.quick else split(*load_images(folder / "imagenet-val-800.parquet", dense))[0]
    variants = (
        Variant("images of all classes", every, None),
        Variant("images of the ten classes", ten, None),
        Variant("images of the ten classes, `classes`", ten, IMAGENETTE),
    )
    top1 = top1_of_ten(dense, held_out)
    rows, table = [Row("dense", top1, "top-1 %")], [["1.0x", "dense", f"{top1:.1f}", "-"]]
    for variant in variants[-1:] if options.quick else variants:
        for fraction, model, seconds in pruned(dense, variant):
            top1, macs = top1_of_ten(model, held_out), remaining_macs(model, dense)
            name = f"{fraction}x MACs, {variant.label}"
            rows += [Row(name, top1, "top-1 %"), Row(f"{name}, remaining MACs", macs, "of the MACs")]
            table.append([f"{fraction}x", variant.label, f"{top1:.1f}", f"{seconds:.0f}"])
            print(table[-1], flush=True)
    if not options.quick:
        about = f"{sum(len(labels) for _, labels in held_out)} evaluated images. {__doc__}"
        header = ["MACs", "calibration", "top-1 over the ten", "seconds"]
        write_table(
            ROOT / "docs/results/classes.md", "Ten of 1,000 classes", about, header, sorted(table, reverse=True)
        )
    write_results("classes", rows, options.quick)


def balanced(images: Tensor, labels: Tensor, per_class: int) -> Batches:
    """Return the first images of each of the ten classes, in batches of up to 50, classes in turn."""
    chosen = torch.stack([torch.nonzero(labels == label)[:per_class, 0] for label in IMAGENETTE], dim=1).flatten()
    return [(images[rows], labels[rows]) for rows in chosen.split(50)]


def pruned(dense: nn.Module, variant: Variant) -> Iterator[tuple[float, nn.Module, float]]:
    """Yield the fraction of the MACs, the pruned model and the seconds of scoring and pruning; one set of scores."""
    start = time.perf_counter()
    plans = [
        plan_for(
            PruneConfig(method="unit-obs", target={"macs": fraction}, kinds=KINDS, classes=variant.classes),
            ScoreConfig(memory_mb=4096),
        )
        for fraction in FRACTIONS
    ]
    batches = images_of_classes(variant.calibration, variant.classes)
    model = prepared(copy.deepcopy(dense), plans[0], batches)
    importance = plans[0].method.criterion(model, groups_for(model, plans[0]), batches, plans[0].context(1))
    scoring = time.perf_counter() - start
    for fraction, plan in zip(FRACTIONS, plans, strict=True):
        start, work = time.perf_counter(), copy.deepcopy(model)
        masks = select_cycle_masks(work, importance.scores, plan, cycle_state(work, plan)).masks
        for _ in prune_cycles(work, plan, batches, masks, dict(importance.statistics)):
            pass
        yield fraction, work, scoring + time.perf_counter() - start


def top1_of_ten(model: nn.Module, held_out: Batches) -> float:
    """Return the top-1 in % by the ten logits."""
    narrow = model if kept_classes(model) else keep_classes(copy.deepcopy(model), IMAGENETTE)
    return accuracy(narrow, held_out)[0]["top1"]


def remaining_macs(model: nn.Module, dense: nn.Module) -> float:
    """Return the MACs as a fraction of those of the dense model with 1,000 outputs."""
    example = torch.zeros(1, 3, 224, 224)
    return count(model, example).macs / count(dense, example).macs


if __name__ == "__main__":
    main()
