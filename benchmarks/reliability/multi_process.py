"""Two and four gloo processes compared with one: Fisher scores, KL scores and training, with and without micro-batches.

A tiny ViT in float64. Scores: largest difference over all units, relative to the largest score of a group, on 6
batches. Training: largest absolute difference of a weight after any step, with the same global batches (the last one
smaller than the number of processes), AdamW, clipping, weights kept at zero; "mixed" adds Mixup, CutMix, averaged
weights and a teacher. Writes benchmarks/results/equality.json and docs/results/equality.md.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from benchmarks.lib.results import Row, arguments, write_results, write_table
from vitprune import find_groups, zero
from vitprune.config.train_config import TrainConfig
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.models.weights import read_weights, write_weights
from vitprune.pipeline import score_stage
from vitprune.pruning.methods import CRITERIA
from vitprune.runtime.distributed import ProcessGroup, process_group
from vitprune.training.distillation import classification, logit_distillation
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.step import local_share

ROOT = Path(__file__).parents[2]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
SCORES = ("kl-fisher", "kl-exact")
MIXED = {"mixup": 0.3, "cutmix": 0.5, "ema": 0.9}
TRAININGS: dict[str, dict[str, object]] = {
    "training": {},
    "training, 3 micro-batches": {"accumulate": 3},
    "training, mixed": MIXED,
    "training, mixed, 3 micro-batches": MIXED | {"accumulate": 3},
}
BOUND = 1e-9


def main() -> None:
    """Start the process groups, compare and write the tables; with EQUALITY_OUT set, compute as one process."""
    if "EQUALITY_OUT" in os.environ:
        compute(Path(os.environ["EQUALITY_OUT"]))
        return
    quick = arguments(__doc__).quick
    numbers = (1, 2) if quick else (1, 2, 4)
    results = {number: run_processes(number) for number in numbers}
    rows, table = [], []
    for what in (*SCORES, *TRAININGS):
        reference = results[1][
            "training" if what == "training, 3 micro-batches" else what.removesuffix(", 3 micro-batches")
        ]
        cells = [what]
        for number in numbers:
            off = difference(reference, results[number][what], what in SCORES)
            rows.append(Row(f"{what}, {number} processes", off, "largest difference", f"<= {BOUND:g}", off <= BOUND))
            cells.append(f"{off:.1e}")
        table.append(cells)
    if not quick:
        header = ["what", *(f"{number} process{'es' if number > 1 else ''}" for number in numbers)]
        write_table(ROOT / "docs/results/equality.md", "One process and several", __doc__ or "", header, table)
    write_results("equality", rows, quick)


def run_processes(number: int) -> dict[str, dict[str, Tensor]]:
    """Run so many processes and return their results."""
    with tempfile.TemporaryDirectory() as name:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"EQUALITY_OUT": name, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{number}"] if number > 1 else []
        )
        subprocess.run([sys.executable, *launcher, "-m", "benchmarks.reliability.multi_process"], env=env, check=True)
        return {what: read_weights(Path(name) / f"{what}.safetensors") for what in (*SCORES, *TRAININGS)}


def difference(one: dict[str, Tensor], other: dict[str, Tensor], relative: bool) -> float:
    """Return the largest difference of all tensors, for scores relative to the largest value of a tensor."""
    assert one.keys() == other.keys()
    scale = {name: float(tensor.abs().max()) if relative else 1.0 for name, tensor in one.items()}
    return max(float((tensor - other[name]).abs().max()) / (scale[name] or 1.0) for name, tensor in one.items())


def compute(directory: Path) -> None:
    """Compute scores and trainings as one of several processes, or alone."""
    torch.set_num_threads(1)
    with process_group() as dist:
        for name in SCORES:
            model = tiny_vit(0)
            work = score_stage.ScoringJob(
                CRITERIA[name], find_groups(model, ["ffn", "head"]), batches(6, 4), DEFAULT_CONTEXT
            )
            scores = work.importance(model, True, directory / f"partial-{name}", dist)
            if scores is not None:
                write_weights(scores.scores, directory / f"{name}.safetensors")
        for name, settings in TRAININGS.items():
            steps = train_steps(settings, dist)
            if dist.rank == 0:
                write_weights(steps, directory / f"{name}.safetensors")


def tiny_vit(seed: int) -> nn.Module:
    """Return a tiny ViT with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SIZES)
    return model.double().eval()


def batches(number: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of noise with labels."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn((size, 3, 32, 32), generator=generator, dtype=torch.float64) for _ in range(number)]
    return [(x, (torch.arange(size) + n) % 7) for n, x in enumerate(images)]


def train_steps(settings: dict[str, object], dist: ProcessGroup) -> dict[str, Tensor]:
    """Train two epochs; return the weights after every step, by step and name."""
    model, weights = tiny_vit(0), dict[str, Tensor]()
    groups = find_groups(model, ["weight"])
    zeros = FrozenZeros(groups, {group.name: model.get_parameter(group.name).detach().abs() > 0.01 for group in groups})
    zero(model, groups, zeros.masks)
    recipe = TrainConfig.model_validate({"epochs": 2, "lr": 0.005, "clip": 0.5} | settings)
    noise = [*batches(3, 8), *batches(1, 3)]

    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(noise):
            yield batch if recipe.mixes else local_share(*batch, dist)
            step = epoch * len(noise) + number
            weights.update({f"{step}/{name}": tensor.clone() for name, tensor in model.state_dict().items()})

    task = logit_distillation(model, tiny_vit(1), 1.0, 2.0, 0.0) if recipe.mixes else classification(model)
    train(task, epoch_batches, len(noise), recipe, 0, lambda row: None, zeros, dist=dist)
    return weights | {f"end/{name}": tensor for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main()
