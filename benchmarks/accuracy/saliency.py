"""Pruning of the backbone of a saliency network without labels: a DINOv2 ViT-S of timm.

Calibration on the first images of imagenet-one-per-class-1000, evaluation on the first of imagenet-val-800; no label is
used. MACs are those of the backbone; the decoder is not pruned. Values: mean correlation of the heatmap with that of
the dense model, and mean IoU at 0.5. *Reconstructed*: four passes over the calibration images, of which a tenth is held
out. Torch-Pruning removes hidden units and attention channels by one global ranking, by the L2 norm or by the
first-order change of the mean squared logits; its ratio is found by bisection. Rows that were measured are recorded in
benchmarks/results/saliency-notes.jsonl, so that an interrupted benchmark continues; delete the file to start over.
Needs VITPRUNE_REAL_DATA, and Torch-Pruning for its rows (pip install 'vitprune[bench]'). Writes
benchmarks/results/saliency.json and docs/results/saliency.md.
"""

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.accuracy import torch_pruning
from benchmarks.accuracy.torch_pruning import closest
from benchmarks.lib.results import Recorded, Row, arguments, real_data, write_results, write_table
from benchmarks.lib.saliency import MEAN, SIDE, STD, heatmap_agreement, load_saliency
from vitprune import ReconstructConfig, ScoreConfig, count, prune

ROOT = Path(__file__).parents[2]
OF_UNITS = (
    "unit-obs",
    "unit-obs, reconstructed",
    "upvits-fisher",
    "channel-magnitude",
    "Torch-Pruning, l2",
    "Torch-Pruning, taylor",
)
METHODS = {
    "0.7x MACs": OF_UNITS,
    "0.5x MACs": OF_UNITS,
    "2:4": ("obc", "obc, reconstructed", "n:m"),
}
FRACTIONS, PASSES = {"0.7x MACs": 0.7, "0.5x MACs": 0.5}, 4


@dataclass(frozen=True)
class Measured:
    """Agreement of the heatmaps of one pruned model with those of the dense one."""

    goal: str
    method: str
    correlation: float
    overlap: float


def main() -> None:
    """Prune with every method to every goal, and write the table."""
    options = arguments(
        __doc__,
        {
            "images": (200, "calibration images"),
            "evaluated": (800, "images of the evaluation"),
            "threads": (2, "threads"),
            "goals": (",".join(METHODS), "goals"),
            "methods": ("", "methods, separated by semicolons; empty: all of each goal"),
        },
    )
    torch.set_num_threads(options.threads)
    folder, dense = real_data(), load_saliency(real_data())
    images, evaluated = (8, 8) if options.quick else (options.images, options.evaluated)
    calibration = read_images(folder / "imagenet-one-per-class-1000.parquet", images).split(20)
    held_out = read_images(folder / "imagenet-val-800.parquet", evaluated)
    expected = heatmaps(dense, held_out)
    done, methods = Recorded("saliency", Measured, options.quick), options.methods.split(";")
    wanted = [(goal, method) for goal in options.goals.split(",") for method in METHODS[goal]]
    for goal, method in wanted[:1] if options.quick else wanted:
        is_known = any((row.goal, row.method) == (goal, method) for row in done)
        if not is_known and (methods == [""] or method in methods):
            model = pruned(dense, goal, method, calibration)
            done.record(Measured(goal, method, *heatmap_agreement(heatmaps(model, held_out), expected)))
    rows = []
    for row in done:
        what = f"{row.goal}, {row.method}"
        rows += [Row(f"{what}, correlation", row.correlation, ""), Row(f"{what}, IoU", row.overlap, "")]
    if not options.quick:
        order = [(goal, method) for goal, names in METHODS.items() for method in names]
        cells = [
            [row.goal, row.method, f"{row.correlation:.3f}", f"{row.overlap:.3f}"]
            for row in sorted(done, key=lambda row: order.index((row.goal, row.method)))
        ]
        about = f"{images} calibration images, {evaluated} evaluated. {__doc__}"
        header = ["goal", "method", "correlation", "IoU"]
        write_table(ROOT / "docs/results/saliency.md", "A saliency network without labels", about, header, cells)
    write_results("saliency", rows, options.quick)


def pruned(dense: nn.Module, goal: str, method: str, calibration: Sequence[Tensor]) -> nn.Module:
    """Return the model with a pruned backbone."""
    name, _, variant = method.partition(", ")
    if goal in FRACTIONS:
        example = calibration[0][:1]
        total = count(dense, example).macs
        backbone = total - count(dense.decoder, torch.zeros(1, 384, SIDE // 14, SIDE // 14)).macs
        macs = 1 - (1 - FRACTIONS[goal]) * backbone / total
        if name == "Torch-Pruning":
            gradients = mean_gradients(dense, calibration) if variant == "taylor" else {}
            return closest(dense, macs, lambda ratio: by_torch_pruning(dense, gradients, variant, ratio))
    return prune(
        dense,
        name,
        **({"target": {"macs": macs}} if goal in FRACTIONS else {"scope": goal}),
        calibration=calibration,
        within="backbone",
        config=ScoreConfig(memory_mb=4096),
        reconstruct=ReconstructConfig(passes=PASSES) if variant == "reconstructed" else False,
    ).model


def mean_gradients(dense: nn.Module, calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean gradient of the mean squared logits."""
    names, parameters = zip(*dense.named_parameters(), strict=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for images in calibration:
        loss = dense(images).square().mean()
        for sums, grad in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                sums += grad / len(calibration)
    return dict(zip(names, total, strict=True))


def by_torch_pruning(dense: nn.Module, gradients: Mapping[str, Tensor], criterion: str, ratio: float) -> nn.Module:
    """Return a copy whose backbone Torch-Pruning has pruned in one step, with the sizes that timm stores updated."""
    setup, model = torch_pruning.Setup(criterion, "global", "inner"), copy.deepcopy(dense)
    for name, grad in gradients.items():
        model.get_parameter(name).grad = grad.clone()
    tp, backbone = torch_pruning.library(), cast("Any", model.backbone)
    scales = [scale.gamma for block in backbone.blocks for scale in (block.ls1, block.ls2)]
    unwrapped = [backbone.cls_token, backbone.pos_embed, *scales]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, SIDE, SIDE),
        torch_pruning.importance(tp, setup),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[*torch_pruning.ignored(backbone, "inner"), *model.decoder.modules()],
        num_heads={block.attn.qkv: block.attn.num_heads for block in backbone.blocks},
        prune_head_dims=True,
        unwrapped_parameters=[(parameter, parameter.ndim - 1) for parameter in unwrapped],
        in_channel_groups={},  # the default dicts are shared by all pruners
        out_channel_groups={},
    )
    pruner.step()
    model.zero_grad()
    for block in backbone.blocks:
        torch_pruning.resize(block.attn, "inner")
    return model


def read_images(path: Path, number: int) -> Tensor:
    """Return the first images of a Parquet file, resized, cropped and normalized, (N, 3, 224, 224)."""
    transform = v2.Compose(
        [
            v2.Resize(SIDE),
            v2.CenterCrop(SIDE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    column = pq.read_table(path, columns=["image"])["image"].slice(0, number)
    return torch.stack([transform(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in column.to_pylist()])


@torch.no_grad()
def heatmaps(model: nn.Module, images: Tensor) -> Tensor:
    """Return the heatmaps (N, 1, 56, 56) of images, averaged over 4 x 4 pixels."""
    maps = [model(part).sigmoid() for part in images.split(10)]
    return nn.functional.avg_pool2d(torch.cat(maps), 4)


if __name__ == "__main__":
    main()
