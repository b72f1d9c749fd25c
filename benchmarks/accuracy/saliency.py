"""Pruning of the backbone of a dense model without labels: a timm DINOv2 ViT-S inside a saliency network.

Calibration on the first images of imagenet-one-per-class-1000, evaluation on the first of imagenet-val-800; no label is
used. MACs are those of the backbone; the decoder is not pruned. Values: mean correlation of the heatmap with that of
the dense model, and mean IoU at 0.5. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/saliency.json and
docs/results/saliency.md.
"""

import io
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from benchmarks.lib.saliency import MEAN, SIDE, STD, heatmap_agreement, load_saliency
from vitprune import BadInput, ReconstructConfig, ScoreConfig, count, prune

ROOT = Path(__file__).parents[2]
METHODS = ("unit-obs", "unit-obs, reconstructed", "corp", "upvits-fisher", "channel-magnitude")
FRACTIONS = (0.7, 0.5)


def main() -> None:
    """Prune with every method to every fraction of the backbone's MACs, and write the table."""
    options = arguments(
        __doc__,
        {
            "images": (200, "calibration images"),
            "evaluated": (200, "images of the evaluation"),
            "threads": (2, "threads"),
            "methods": (";".join(METHODS), "methods, separated by semicolons"),
        },
    )
    torch.set_num_threads(options.threads)
    folder, dense = real_data(), load_saliency(real_data())
    images, evaluated = (8, 8) if options.quick else (options.images, options.evaluated)
    calibration = read_images(folder / "imagenet-one-per-class-1000.parquet", images).split(20)
    held_out = read_images(folder / "imagenet-val-800.parquet", evaluated)
    expected, example = heatmaps(dense, held_out), held_out[:1]
    total = count(dense, example).macs
    backbone = total - count(dense.decoder, torch.zeros(1, 384, SIDE // 14, SIDE // 14)).macs
    rows, table = [], []
    for method in METHODS[:1] if options.quick else options.methods.split(";"):
        for fraction in FRACTIONS[:1] if options.quick else FRACTIONS:
            start = time.perf_counter()
            try:
                result = prune(
                    dense,
                    method.partition(",")[0],
                    target={"macs": 1 - (1 - fraction) * backbone / total},
                    calibration=calibration,
                    within="backbone",
                    config=ScoreConfig(memory_mb=4096),
                    reconstruct=ReconstructConfig(passes=4) if "reconstructed" in method else False,
                )
            except BadInput as error:
                table.append([f"{fraction}x", method, str(error)[:100], "", ""])
                continue
            seconds = time.perf_counter() - start
            correlation, overlap = heatmap_agreement(heatmaps(result.model, held_out), expected)
            what = f"{fraction}x MACs of the backbone, {method}"
            rows += [Row(f"{what}, correlation", correlation, ""), Row(f"{what}, IoU", overlap, "")]
            table.append([f"{fraction}x", method, f"{correlation:.3f}", f"{overlap:.3f}", f"{seconds:.0f}"])
            print(table[-1], flush=True)
    header = ["MACs of the backbone", "method", "correlation", "IoU", "seconds"]
    if not options.quick:
        about = f"{images} calibration images, {evaluated} evaluated. {__doc__}"
        write_table(ROOT / "docs/results/saliency.md", "A dense model without labels", about, header, table)
    write_results("saliency", rows, options.quick)


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
