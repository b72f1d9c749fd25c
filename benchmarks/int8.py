"""INT8 of DeiT-Tiny after pruning half of its weights by LAMP, no training: what calibration costs, what stays zero.

Post-training quantization of the ONNX export: weights per channel and symmetric, inputs of layers with weights in 8 bits,
all else in float. Calibrated on 128 Imagenette training images, evaluated on all 800 of imagenet-val-800 by
onnxruntime, which also runs the file in float. "agrees" counts images with the same answer as in float.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/int8.json and docs/results/int8.md.
"""

import copy
import tempfile
from pathlib import Path

import torch
from harness import Row, arguments, real_data, write_results, write_table
from oneshot import load_images

from vitprune import data, models, plan_for
from vitprune.compress import compress
from vitprune.export import to_onnx
from vitprune.int8 import IMAGES, side_by_side, to_int8

ROOT = Path(__file__).parent.parent
PROMISE = 0.5  # points of top-1, the larger of the two minus the other
FULL = [(0.5, "percentile", 7), (0.0, "percentile", 7), (0.5, "minmax", 7), (0.5, "percentile", 8), (0.5, "entropy", 7)]


def main() -> None:
    """Quantize, run both files on the same images, and write the tables."""
    quick = arguments(__doc__).quick
    folder = real_data()
    torch.set_num_threads(1)
    dense = models.create("deit_tiny_patch16_224", checkpoint=folder / "deit_tiny_patch16_224.safetensors").eval()
    images, labels = load_images(folder / "imagenet-val-800.parquet", dense)
    if quick:
        images, labels = images[::8], labels[::8]
    batches = list(zip(images.split(40), labels.split(40), strict=True))
    given = calibration_images(folder / "imagenette-train-3000.parquet", dense)
    rows, table = [], []
    with tempfile.TemporaryDirectory() as name:
        for sparsity, calibration, bits in FULL[:1] if quick else FULL:
            model = copy.deepcopy(dense)
            for _ in compress(model, plan_for("lamp", sparsity), []):
                pass
            source, path = Path(name) / "fp32.onnx", Path(name) / "int8.onnx"
            size = to_onnx(model, source, images[:2])["bytes"]
            facts = to_int8(source, path, given, calibration, bits) | side_by_side([source, path], batches)
            off = facts["int8_top1"] - facts["fp32_top1"]
            label = f"LAMP {sparsity:.0%}, {calibration}, {bits}-bit weights"
            holds = abs(off) <= PROMISE if (calibration, bits) == ("percentile", 7) and not quick else None
            rows.append(Row(f"{label}: change", off, "points", f"within {PROMISE}", holds))
            rows.append(Row(f"{label}: agreement", facts["int8_agrees"], "%"))
            kept = f"{facts['zeros']:,} of {facts['zeros']:,}, now {facts['int8_zeros']:,}"  # to_int8 raises otherwise
            sizes = f"{size / 1e6:.1f} to {facts['bytes'] / 1e6:.1f}"
            tops = [f"{facts['fp32_top1']:.2f}", f"{facts['int8_top1']:.2f}", f"{off:+.2f}"]
            table.append([f"{sparsity:.0%}", calibration, f"{bits}", *tops, f"{facts['int8_agrees']:.1f} %", kept, sizes])
            print(table[-1], flush=True)
    if not quick:
        header = ["removed", "calibration", "weight bits", "float top-1 %", "INT8 top-1 %", "change"]
        header += ["agrees", "zeros that stayed", "MB"]
        write_table(ROOT / "docs/results/int8.md", "INT8 after pruning", __doc__ or "", header, table)
    write_results("int8", rows, quick)


def calibration_images(path: Path, model: torch.nn.Module) -> torch.Tensor:
    """Images that calibrate, spread over the whole file."""
    source = data.open_source(f"parquet:{path}")
    transform = data.transform(data.data_config(model))
    names = source.ids[:: len(source.ids) // IMAGES][:IMAGES]
    return torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in names])


if __name__ == "__main__":
    main()
