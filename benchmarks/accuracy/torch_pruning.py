"""Torch-Pruning on DeiT-Tiny without any training: the best that its criteria and rankings give at a share or at MACs.

Criteria: L2 norm, Taylor (of weights, of their sums) and Hessian, on rows 600..799 of imagenet-val-800 with labels;
rankings: local, global (with its normalisation and without), isomorphic; what goes: FFN units, attention channels
with them, whole heads with them, or every width. Where MACs are the goal, its ratio is found by bisection. Every
set-up is judged by its top-1 on rows 600..799; the four best of each goal are evaluated on rows 0..599, and the table
has the one of highest top-1. Its Hessian is averaged over images here (`accumulate_grad` of 1.6.1 keeps the last
one), and attention keeps the scale that its weights were trained with. Needs VITPRUNE_REAL_DATA and Torch-Pruning
(pip install 'vitprune[bench]'). Writes benchmarks/results/peers.json and docs/results/peers.md.
"""

import copy
import importlib
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.deit_tiny import load_images
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import models
from vitprune.architectures import attention, vit
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.evaluation.losses import cross_entropy

ROOT = Path(__file__).parents[2]
CRITERIA = ("l2", "taylor", "taylor of sums", "hessian")
RANKINGS = ("local", "global", "global, not normalised", "isomorphic")
FINALISTS, CLOSE = 4, 0.002
Batches = Sequence[tuple[Tensor, Tensor]]
Slopes = Mapping[str, Mapping[str, Tensor]]  # criterion -> parameter -> what Torch-Pruning reads as its gradient


@dataclass(frozen=True)
class Setup:
    """How Torch-Pruning is used: what goes is `ffn`, `inner` (with attention channels), `heads` or `all`."""

    criterion: str
    ranking: str
    part: str

    def __str__(self) -> str:
        """In words."""
        return f"{self.criterion}, {self.ranking}, {self.part}"


@dataclass(frozen=True)
class Goal:
    """How much goes: a share of the FFN units, or all but a fraction of the MACs."""

    removed: float | None = None
    macs: float | None = None

    def __str__(self) -> str:
        """In words."""
        return f"{self.removed:.0%} of ffn" if self.removed is not None else f"{self.macs:g}x MACs"

    @property
    def setups(self) -> list[Setup]:
        """What is tried to reach it; of FFN units alone, isomorphic is global."""
        if self.removed is not None:
            return [Setup(*pair, "ffn") for pair in itertools.product(CRITERIA, RANKINGS[:3])]
        whole = [Setup(*three) for three in itertools.product(CRITERIA, RANKINGS, ("inner", "all"))]
        whole += Goal(removed=0.5).setups
        return whole + [Setup(criterion, "global", "heads") for criterion in CRITERIA]


@dataclass(frozen=True)
class Found:
    """A set-up at a goal: top-1 and loss in nats on calibration images, and top-1 on the others where it got so far."""

    goal: Goal
    setup: Setup
    right: float
    loss: float
    params: float
    macs: float
    top1: float | None = None


def library() -> Any:
    """Torch-Pruning, or the end of the benchmark with a word about how to get it."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        print("Torch-Pruning is missing: pip install 'vitprune[bench]' (or pip install 'torch-pruning>=1.6.1')")
        sys.exit(0)


def slopes(dense: nn.Module, batches: Batches) -> Slopes:
    """Mean gradient of the loss, and mean of the squared gradients of single images, of every parameter."""
    names, parameters = zip(*dense.named_parameters(), strict=True)
    first = {name: torch.zeros_like(parameter) for name, parameter in dense.named_parameters()}
    second = {name: torch.zeros_like(parameter) for name, parameter in dense.named_parameters()}
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = cross_entropy(dense(image), label)
        for name, slope in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            first[name] += slope / len(images)
            second[name] += slope.square() / len(images)
    return {"l2": {}, "taylor": first, "taylor of sums": first, "hessian": second}


def torch_pruning_case(dense: nn.Module, gradients: Slopes, setup: Setup, goal: Goal) -> nn.Module:
    """A copy of the model, pruned by Torch-Pruning: at a ratio, or at the ratio whose MACs are closest to the goal."""
    if goal.removed is not None:
        return pruned(dense, gradients[setup.criterion], setup, goal.removed)
    return closest(dense, goal.macs or 1.0, lambda ratio: pruned(dense, gradients[setup.criterion], setup, ratio))


def closest(dense: nn.Module, macs: float, at: Callable[[float], nn.Module]) -> nn.Module:
    """The model that a bisection of the ratio finds closest to a fraction of the dense model's MACs."""
    image = torch.zeros(1, 3, 224, 224)
    whole = count(dense, image).macs
    low, high, best, distance = 0.0, 1.0, dense, 1.0
    while high - low > 1e-3 and distance > CLOSE * macs:
        middle = (low + high) / 2
        model = at(middle)
        off = count(model, image).macs / whole - macs
        if abs(off) < distance:
            best, distance = model, abs(off)
        low, high = (middle, high) if off > 0 else (low, middle)
    return best


def pruned(dense: nn.Module, gradients: Mapping[str, Tensor], setup: Setup, ratio: float) -> nn.Module:
    """A copy of a timm ViT, pruned in one step, with the sizes that timm records brought up to date."""
    tp = library()
    model: Any = copy.deepcopy(dense)
    for name, slope in gradients.items():
        model.get_parameter(name).grad = slope.clone()
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 224, 224),
        importance(tp, setup),
        global_pruning=setup.ranking != "local",
        isomorphic=setup.ranking == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=ignored(model, setup.part),
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
        prune_num_heads=setup.part == "heads",
        prune_head_dims=setup.part != "heads",
        head_pruning_ratio=1 / 3 if setup.part == "heads" else 0.0,
        unwrapped_parameters=[(model.cls_token, 2), (model.pos_embed, 2)],  # 1.6.1 asks for a dict and unpacks pairs
        in_channel_groups={},  # its defaults are dicts that all pruners share
        out_channel_groups={},
    )
    pruner.step()
    model.zero_grad()
    for block in model.blocks:
        resize(block.attn, setup.part)
    vit.resize_width(model, (model.pos_embed.shape[2],))
    return model


def importance(tp: Any, setup: Setup) -> Any:
    """The criterion, as Torch-Pruning makes it."""
    normalizer = None if setup.ranking == RANKINGS[2] else "mean"
    if setup.criterion == "l2":
        return tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    if setup.criterion.startswith("taylor"):
        return tp.importance.GroupTaylorImportance(normalizer=normalizer, multivariable=setup.criterion != "taylor")
    return tp.importance.GroupHessianImportance(normalizer=normalizer)


def ignored(model: Any, part: str) -> list[nn.Module]:
    """Layers whose outputs stay: the classifier, then what writes into the residual stream, then attention."""
    layers: list[nn.Module] = [model.head]
    if part != "all":
        layers += [model.patch_embed.proj, *(layer for b in model.blocks for layer in (b.attn.proj, b.mlp.fc2))]
    if part == "ffn":
        layers += [block.attn.qkv for block in model.blocks]
    return layers


def resize(attn: Any, part: str) -> None:
    """Let an attention know how many heads or channels it has left."""
    inner = attn.qkv.out_features // 3
    if part == "heads":
        attn.num_heads, attn.attn_dim = inner // attn.head_dim, inner
    elif inner != attn.attn_dim:
        (group,) = attention.groups("attention", "attn", attn)
        group.resize(attn, group.shape)


@torch.no_grad()
def loss_of(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy in nats; batches must be of one size."""
    return sum(float(cross_entropy(model(images), labels)) for images, labels in batches) / len(batches)


def screened(dense: nn.Module, gradients: Slopes, goal: Goal, batches: Batches) -> list[tuple[Found, nn.Module]]:
    """Every set-up at a goal with its model, that of highest top-1 first; those that miss the MACs by 1 % are out."""
    whole, image = count(dense, batches[0][0]), batches[0][0]
    found = []
    for setup in goal.setups:
        model = torch_pruning_case(dense, gradients, setup, goal)
        cost = count(model, image)
        shares = cost.params / whole.params, cost.macs / whole.macs
        if goal.macs is None or abs(shares[1] / goal.macs - 1) <= 0.01:
            right = accuracy(model, batches)[0]["top1"]
            found.append((Found(goal, setup, right, loss_of(model, batches), *shares), model))
    return sorted(found, key=lambda pair: (-pair[0].right, pair[0].loss))


def evaluated(screen: Sequence[tuple[Found, nn.Module]], held_out: Batches) -> list[Found]:
    """The finalists with their top-1, the best first; then the others."""
    finals = [replace(f, top1=accuracy(model, held_out)[0]["top1"]) for f, model in screen[:FINALISTS]]
    return sorted(finals, key=lambda f: -(f.top1 or 0.0)) + [f for f, _ in screen[FINALISTS:]]


def split(folder: Path, dense: nn.Module) -> tuple[Batches, Batches]:
    """Calibration and evaluation images of the ImageNet sample, as in the one-shot table."""
    images, labels = load_images(folder / "imagenet-val-800.parquet", dense)
    calibration = [(images[row : row + 50], labels[row : row + 50]) for row in range(600, 800, 50)]
    return calibration, [(images[row : row + 100], labels[row : row + 100]) for row in range(0, 600, 100)]


def solved(folder: Path, goals: Sequence[Goal], images: int) -> list[list[Found]]:
    """What was found at each goal, with criteria from the first so many calibration images."""
    torch.set_num_threads(1)
    dense = load_dense(folder)
    calibration, held_out = split(folder, dense)
    gradients = slopes(dense, calibration[: images // 50])
    return [evaluated(screened(dense, gradients, goal, calibration), held_out) for goal in goals]


def load_dense(folder: Path) -> nn.Module:
    """The published DeiT-Tiny."""
    return models.create("deit_tiny_patch16_224", checkpoint=folder / "deit_tiny_patch16_224.safetensors").eval()


def main() -> None:
    """Try every set-up at every goal, in two processes of one thread each, and write the tables."""
    quick, folder = arguments(__doc__).quick, real_data()
    library()
    torch.set_num_threads(1)
    goals = [Goal(removed=share) for share in ((0.25,) if quick else (0.1, 0.25, 0.5))]
    goals += [Goal(macs=fraction) for fraction in (() if quick else (0.85, 0.7, 0.5))]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(solved, folder, goals[first::2], 50 if quick else 200) for first in range(2)]
        dense = load_dense(folder)
        base = accuracy(dense, split(folder, dense)[1])[0]["top1"]
        halves = [job.result() for job in jobs]
    rows, cells = [Row("dense", base, "top-1 %")], []
    for number, goal in enumerate(goals):
        found = halves[number % 2][number // 2]
        best, top1 = found[0], found[0].top1 or 0.0
        rows += [Row(f"{goal}: {f.setup}", f.top1, "top-1 %") for f in found if f.top1 is not None]
        rows += [Row(f"{goal}: {f.setup}, {f.macs:.3f}x MACs, calibration", f.right, "top-1 %") for f in found]
        shares = [f"{best.params:.2f}x", f"{best.macs:.3f}x"]
        cells.append([str(goal), str(best.setup), *shares, f"{top1:.1f}", f"{top1 - base:+.1f}"])
    if not quick:
        header = ["goal", "best criterion, ranking, part", "params", "MACs", "top-1 %", "change"]
        title = "Torch-Pruning's best on DeiT-Tiny, no training"
        write_table(ROOT / "docs/results/peers.md", title, __doc__ or "", header, cells)
    write_results("peers", rows, quick)


if __name__ == "__main__":
    main()
