"""Torch-Pruning on DeiT-Tiny without training: the best of its criteria and rankings at a sparsity or a MACs target.

Criteria: L2 norm, Taylor (of weights, of their sums) and Hessian, on rows 600..799 of imagenet-val-800 with labels;
rankings: local, global (with and without its normalization), isomorphic; pruned parts: FFN units, also attention
channels, also whole heads, or every width. For MACs targets, its pruning ratio is found by bisection. Every setting is
ranked by its top-1 on rows 600..799; the four best of each target are evaluated on rows 0..599, and the table has the
one of highest top-1. Its Hessian is averaged over images here (`accumulate_grad` of 1.6.1 keeps only the last one), and
attention keeps the scale that its weights were trained with. Needs VITPRUNE_REAL_DATA and Torch-Pruning
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

from benchmarks.lib.deit_tiny import Batches, load_dense, load_images, split
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.evaluation.losses import cross_entropy

ROOT = Path(__file__).parents[2]
CRITERIA = ("l2", "taylor", "taylor of sums", "hessian")
RANKINGS = ("local", "global", "global, not normalised", "isomorphic")
FINALISTS, CLOSE = 4, 0.002
MeanGradients = Mapping[str, Mapping[str, Tensor]]  # criterion -> parameter -> gradient for Torch-Pruning


@dataclass(frozen=True)
class Setup:
    """Setting of Torch-Pruning; `part` is ffn, inner (also attention channels), heads (also heads) or all."""

    criterion: str
    ranking: str
    part: str

    def __str__(self) -> str:
        """Return the label."""
        return f"{self.criterion}, {self.ranking}, {self.part}"


@dataclass(frozen=True)
class Goal:
    """Target: the fraction of FFN units to remove, or the remaining fraction of the MACs."""

    removed: float | None = None
    macs: float | None = None

    def __str__(self) -> str:
        """Return the label."""
        return f"{self.removed:.0%} of ffn" if self.removed is not None else f"{self.macs:g}x MACs"

    @property
    def setups(self) -> list[Setup]:
        """Settings to compare; for FFN units alone, isomorphic equals global."""
        if self.removed is not None:
            return [Setup(*pair, "ffn") for pair in itertools.product(CRITERIA, RANKINGS[:3])]
        setups = [Setup(*fields) for fields in itertools.product(CRITERIA, RANKINGS, ("inner", "all"))]
        setups += Goal(removed=0.5).setups
        return setups + [Setup(criterion, "global", "heads") for criterion in CRITERIA]


@dataclass(frozen=True)
class SetupResult:
    """A setting at a target: top-1 and loss in nats on calibration images; top-1 on evaluation images for finalists."""

    goal: Goal
    setup: Setup
    calibration_top1: float
    loss: float
    params: float
    macs: float
    top1: float | None = None


def library() -> Any:
    """Return the module torch_pruning; exit with a message if it is not installed."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        print("Torch-Pruning is not installed: pip install 'vitprune[bench]' (or pip install 'torch-pruning>=1.6.1')")
        sys.exit(0)


def mean_gradients(dense: nn.Module, batches: Batches) -> MeanGradients:
    """Return the mean gradient of the loss and the mean squared per-image gradient of every parameter."""
    names, parameters = zip(*dense.named_parameters(), strict=True)
    first = {name: torch.zeros_like(parameter) for name, parameter in dense.named_parameters()}
    second = {name: torch.zeros_like(parameter) for name, parameter in dense.named_parameters()}
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = cross_entropy(dense(image), label)
        for name, grad in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            first[name] += grad / len(images)
            second[name] += grad.square() / len(images)
    return {"l2": {}, "taylor": first, "taylor of sums": first, "hessian": second}


def torch_pruning_case(dense: nn.Module, gradients: MeanGradients, setup: Setup, goal: Goal) -> nn.Module:
    """Return a copy pruned by Torch-Pruning, at a ratio or at the ratio whose MACs are closest to the target."""
    if goal.removed is not None:
        return prune(dense, gradients[setup.criterion], setup, goal.removed)
    return closest(dense, goal.macs or 1.0, lambda ratio: prune(dense, gradients[setup.criterion], setup, ratio))


def closest(dense: nn.Module, macs: float, prune_at: Callable[[float], nn.Module]) -> nn.Module:
    """Find the ratio by bisection and return the model whose MACs are closest to a fraction of the dense model's."""
    image = torch.zeros(1, 3, 224, 224)
    dense_macs = count(dense, image).macs
    low, high, best, distance = 0.0, 1.0, dense, 1.0
    while high - low > 1e-3 and distance > CLOSE * macs:
        middle = (low + high) / 2
        model = prune_at(middle)
        off = count(model, image).macs / dense_macs - macs
        if abs(off) < distance:
            best, distance = model, abs(off)
        low, high = (middle, high) if off > 0 else (low, middle)
    return best


def prune(dense: nn.Module, gradients: Mapping[str, Tensor], setup: Setup, ratio: float) -> nn.Module:
    """Return a copy of a timm ViT pruned in one step, with the sizes that timm stores updated."""
    tp = library()
    model: Any = copy.deepcopy(dense)
    for name, grad in gradients.items():
        model.get_parameter(name).grad = grad.clone()
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
        unwrapped_parameters=[(model.cls_token, 2), (model.pos_embed, 2)],  # 1.6.1 documents a dict but unpacks pairs
        in_channel_groups={},  # the default dicts are shared by all pruners
        out_channel_groups={},
    )
    pruner.step()
    model.zero_grad()
    for block in model.blocks:
        resize(block.attn, setup.part)
    model.embed_dim = model.num_features = model.head_hidden_size = model.pos_embed.shape[2]
    return model


def importance(tp: Any, setup: Setup) -> Any:
    """Return Torch-Pruning's importance object."""
    normalizer = None if setup.ranking == RANKINGS[2] else "mean"
    if setup.criterion == "l2":
        return tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    if setup.criterion.startswith("taylor"):
        return tp.importance.GroupTaylorImportance(normalizer=normalizer, multivariable=setup.criterion != "taylor")
    return tp.importance.GroupHessianImportance(normalizer=normalizer)


def ignored(model: Any, part: str) -> list[nn.Module]:
    """Return the layers whose outputs are not pruned: classifier, writers of the residual stream, attention."""
    layers: list[nn.Module] = [model.head]
    if part != "all":
        layers += [model.patch_embed.proj, *(layer for b in model.blocks for layer in (b.attn.proj, b.mlp.fc2))]
    if part == "ffn":
        layers += [block.attn.qkv for block in model.blocks]
    return layers


@torch.no_grad()
def resize(attn: Any, part: str) -> None:
    """Update the sizes that an attention stores."""
    inner = attn.qkv.out_features // 3
    if part == "heads":
        attn.num_heads, attn.attn_dim = inner // attn.head_dim, inner
    elif inner != attn.attn_dim:
        head_dim = inner // attn.num_heads
        attn.qkv.weight[:inner] *= (head_dim / attn.head_dim) ** 0.5  # the logits are scaled by head_dim ** -0.5
        attn.qkv.bias[:inner] *= (head_dim / attn.head_dim) ** 0.5
        attn.head_dim, attn.attn_dim, attn.scale = head_dim, inner, head_dim**-0.5


@torch.no_grad()
def loss_of(model: nn.Module, batches: Batches) -> float:
    """Return the mean cross-entropy in nats; all batches have the same size."""
    return sum(float(cross_entropy(model(images), labels)) for images, labels in batches) / len(batches)


def rank_setups(
    dense: nn.Module, gradients: MeanGradients, goal: Goal, batches: Batches
) -> list[tuple[SetupResult, nn.Module]]:
    """Prune with every setting; return results and models by decreasing top-1, without those off the MACs by 1 %."""
    dense_cost, image = count(dense, batches[0][0]), batches[0][0]
    results = []
    for setup in goal.setups:
        model = torch_pruning_case(dense, gradients, setup, goal)
        cost = count(model, image)
        shares = cost.params / dense_cost.params, cost.macs / dense_cost.macs
        if goal.macs is None or abs(shares[1] / goal.macs - 1) <= 0.01:
            top1 = accuracy(model, batches)[0]["top1"]
            results.append((SetupResult(goal, setup, top1, loss_of(model, batches), *shares), model))
    return sorted(results, key=lambda pair: (-pair[0].calibration_top1, pair[0].loss))


def evaluate_finalists(ranking: Sequence[tuple[SetupResult, nn.Module]], held_out: Batches) -> list[SetupResult]:
    """Evaluate the finalists; return them by decreasing top-1, then the others."""
    finals = [replace(f, top1=accuracy(model, held_out)[0]["top1"]) for f, model in ranking[:FINALISTS]]
    return sorted(finals, key=lambda f: -(f.top1 or 0.0)) + [f for f, _ in ranking[FINALISTS:]]


def solve(folder: Path, goals: Sequence[Goal], images: int) -> list[list[SetupResult]]:
    """Return the results for each target, with gradients of the first `images` calibration images."""
    torch.set_num_threads(1)
    dense = load_dense(folder)
    calibration, held_out = split(*load_images(folder / "imagenet-val-800.parquet", dense))
    gradients = mean_gradients(dense, calibration[: images // 50])
    return [evaluate_finalists(rank_setups(dense, gradients, goal, calibration), held_out) for goal in goals]


def main() -> None:
    """Try every setting for every target, in two processes of one thread each, and write the tables."""
    quick, folder = arguments(__doc__).quick, real_data()
    library()
    torch.set_num_threads(1)
    goals = [Goal(removed=share) for share in ((0.25,) if quick else (0.1, 0.25, 0.5))]
    goals += [Goal(macs=fraction) for fraction in (() if quick else (0.85, 0.7, 0.5))]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(solve, folder, goals[first::2], 50 if quick else 200) for first in range(2)]
        dense = load_dense(folder)
        base = accuracy(dense, split(*load_images(folder / "imagenet-val-800.parquet", dense))[1])[0]["top1"]
        halves = [job.result() for job in jobs]
    rows, cells = [Row("dense", base, "top-1 %")], []
    for number, goal in enumerate(goals):
        results = halves[number % 2][number // 2]
        best, top1 = results[0], results[0].top1 or 0.0
        rows += [Row(f"{goal}: {f.setup}", f.top1, "top-1 %") for f in results if f.top1 is not None]
        rows += [
            Row(f"{goal}: {f.setup}, {f.macs:.3f}x MACs, calibration", f.calibration_top1, "top-1 %") for f in results
        ]
        shares = [f"{best.params:.2f}x", f"{best.macs:.3f}x"]
        cells.append([str(goal), str(best.setup), *shares, f"{top1:.1f}", f"{top1 - base:+.1f}"])
    if not quick:
        header = ["target", "best criterion, ranking, part", "params", "MACs", "top-1 %", "change"]
        title = "Torch-Pruning's best settings on DeiT-Tiny, no training"
        write_table(ROOT / "docs/results/peers.md", title, __doc__ or "", header, cells)
    write_results("peers", rows, quick)


if __name__ == "__main__":
    main()
