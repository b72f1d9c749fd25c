"""INT8 of DeiT-Tiny at half of its weights, after a training that knows of the rounding and after one that does not.

Pruned once by CAP (`ovit`, score.damping 4e-6, 256 training images); then batches of 32 of Imagenette's 3000 training
images, taught by the dense model, AdamW, zeros held, with `int8` in the recipe and without, each seed with the same
batches for both. Exported and quantized as the export stage does, calibrated on 128 training images; top-1 over 1000
classes on every second of Imagenette's validation images, run by onnxruntime in float and in INT8. "agrees" counts
images with the same answer in both. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/int8_training.json and
docs/results/int8_training.md.
"""

import copy
import itertools
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from benchmarks.accuracy.int8_ptq import CHOSEN, calibration_images, measured
from benchmarks.accuracy.recovery import images_of
from benchmarks.accuracy.torch_pruning import load_dense
from benchmarks.lib.deit_tiny import damped
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, data
from vitprune.config.train_config import TrainConfig
from vitprune.pruning.prune import prune_cycles
from vitprune.training.distillation import logit_distillation
from vitprune.training.loop import FrozenZeros, train

ROOT = Path(__file__).parents[2]
NAMES = {False: "plain", True: "int8"}
BATCH = 32


def main() -> None:
    """Prune once, train each way with each seed, and write the tables."""
    asked = arguments(__doc__, {"steps": (40, "batches of a training"), "seeds": (3, "of each")})
    real, steps, seeds = real_data(), 2 if asked.quick else asked.steps, 1 if asked.quick else asked.seeds
    torch.set_num_threads(1)
    dense = load_dense(real)
    model, held = pruned(dense, real, 32 if asked.quick else 256)
    given = calibration_images(real / "imagenette-train-3000.parquet", dense)
    validation = list(data.eval_batches(images_of(real, "val", every=50 if asked.quick else 2), 50))
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    table = []
    for seed, int8 in itertools.product(range(seeds), NAMES):
        student = copy.deepcopy(model)
        losses = trained(student, dense, held, real, steps, seed, int8)
        facts = measured(student.eval(), [CHOSEN], given, validation)[CHOSEN] | {"loss": losses}
        found[int8].append(facts)
        tops = [f"{facts[key]:.1f}" for key in ("float", "int8", "agrees")]
        kept = f"{facts['zeros']:,.0f}, now {facts['int8_zeros']:,.0f}"  # to_int8 raises where one got lost
        table.append([NAMES[int8], f"{seed}", f"{losses:.4f}", *tops, kept])
        print(table[-1], flush=True)
    rows = [
        Row(f"{name}: {what}", mean(one[key] for one in found[int8]), unit, runs=seeds)
        for int8, name in NAMES.items()
        for key, what, unit in (
            ("float", "float", "top-1 %"),
            ("int8", "INT8", "top-1 %"),
            ("agrees", "agreement", "%"),
        )
    ]
    if not asked.quick:
        header = ["training", "seed", "loss", "float top-1 %", "INT8 top-1 %", "agrees, %", "zeros that stayed"]
        about = f"{__doc__} Here: {steps} steps."
        write_table(ROOT / "docs/results/int8_training.md", "Training for INT8", about, header, table)
    write_results("int8_training", rows, asked.quick)


def pruned(dense: nn.Module, real: Path, number: int) -> tuple[nn.Module, FrozenZeros]:
    """The model at half of its weights, and what of it is to be held at zero."""
    model = copy.deepcopy(dense)
    table = images_of(real, "train", None, 3000 // number)
    (cycle,) = prune_cycles(
        model, damped(PruneConfig(method="ovit", sparsity=0.5)), list(itertools.islice(data.eval_batches(table, 32), 8))
    )
    return model, FrozenZeros(cycle.zeroed, cycle.masks)


def trained(
    student: nn.Module, dense: nn.Module, held: FrozenZeros, real: Path, steps: int, seed: int, int8: bool
) -> float:
    """Train in place; the mean loss."""
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
        held,
    )
    return rows[-1]["loss"]


if __name__ == "__main__":
    main()
