"""INT8 of DeiT-Tiny at 50 % sparsity after fine-tuning with and without quantization-aware training.

Pruned once by CAP (`ovit`, score.damping 4e-6, 256 training images), then distilled from the dense model on batches of
32 of Imagenette's 3000 training images: AdamW, zeros kept, with and without `int8`; for each seed both use the same
batches. Exported and quantized as by the export stage, calibrated on 128 training images. Top-1 over 1000 classes on
every second Imagenette validation image, by onnxruntime in float and in INT8. "agrees": images with the same
prediction in both. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/int8_training.json and
docs/results/int8_training.md.
"""

import copy
import itertools
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from benchmarks.accuracy.int8_ptq import CHOSEN, calibration_images, measure
from benchmarks.accuracy.recovery import images_of
from benchmarks.lib.deit_tiny import damped, load_dense
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, data
from vitprune.config.train_config import TrainConfig
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.training.distillation import logit_distillation
from vitprune.training.loop import FrozenZeros, train

ROOT = Path(__file__).parents[2]
NAMES = {False: "plain", True: "int8"}
BATCH = 32


def main() -> None:
    """Prune once, train with and without int8 for each seed, and write the tables."""
    options = arguments(__doc__, {"steps": (40, "training steps"), "seeds": (3, "number of seeds")})
    real, steps, seeds = real_data(), 2 if options.quick else options.steps, 1 if options.quick else options.seeds
    torch.set_num_threads(1)
    dense = load_dense(real)
    model, zeros = prune(dense, real, 32 if options.quick else 256)
    images = calibration_images(real / "imagenette-train-3000.parquet", dense)
    validation = list(data.eval_batches(images_of(real, "val", every=50 if options.quick else 2), 50))
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    table = []
    for seed, int8 in itertools.product(range(seeds), NAMES):
        student = copy.deepcopy(model)
        loss = finetune(student, dense, zeros, real, steps, seed, int8)
        facts = measure(student.eval(), [CHOSEN], images, validation)[CHOSEN] | {"loss": loss}
        results[int8].append(facts)
        tops = [f"{facts[key]:.1f}" for key in ("float", "int8", "agrees")]
        kept = f"{facts['zeros']:,.0f}, now {facts['int8_zeros']:,.0f}"  # quantize_int8 raises an error if one is lost
        table.append([NAMES[int8], f"{seed}", f"{loss:.4f}", *tops, kept])
        print(table[-1], flush=True)
    rows = [
        Row(f"{name}: {what}", mean(result[key] for result in results[int8]), unit, runs=seeds)
        for int8, name in NAMES.items()
        for key, what, unit in (
            ("float", "float", "top-1 %"),
            ("int8", "INT8", "top-1 %"),
            ("agrees", "agreement", "%"),
        )
    ]
    if not options.quick:
        header = ["training", "seed", "loss", "float top-1 %", "INT8 top-1 %", "agrees, %", "preserved zeros"]
        about = f"{__doc__} Here: {steps} steps."
        write_table(ROOT / "docs/results/int8_training.md", "Training for INT8", about, header, table)
    write_results("int8_training", rows, options.quick)


def prune(dense: nn.Module, real: Path, number: int) -> tuple[nn.Module, FrozenZeros]:
    """Return the model at 50 % sparsity, and the zeros to keep."""
    model = copy.deepcopy(dense)
    table = images_of(real, "train", None, 3000 // number)
    (cycle,) = prune_cycles(
        model, damped(PruneConfig(method="ovit", sparsity=0.5)), list(itertools.islice(data.eval_batches(table, 32), 8))
    )
    return model, FrozenZeros(cycle.zeroed, cycle.masks)


def finetune(
    student: nn.Module, dense: nn.Module, zeros: FrozenZeros, real: Path, steps: int, seed: int, int8: bool
) -> float:
    """Distil in place; return the mean loss."""
    table = images_of(real, "train", "none")
    recipe = TrainConfig(epochs=1, batch_size=BATCH, lr=2e-4, min_lr=1e-5, weight_decay=0.03, int8=int8)
    rows: list[dict[str, float]] = []
    task = logit_distillation(student, copy.deepcopy(dense), 1.0, 1.0, 0.0)
    train(
        task,
        lambda epoch: itertools.islice(data.train_batches(table, BATCH, seed, epoch), steps),
        steps,
        recipe,
        seed,
        rows.append,
        zeros,
    )
    return rows[-1]["loss"]


if __name__ == "__main__":
    main()
