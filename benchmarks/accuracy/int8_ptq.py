"""INT8 post-training quantization of DeiT-Tiny at 50 % sparsity: accuracy by calibration method, and preserved zeros.

Quantization of the ONNX export: symmetric weights per output channel and 8-bit inputs of all layers with weights;
everything else, such as attention's two products, in float. Calibrated on 128 Imagenette training images, evaluated on
all 800 of imagenet-val-800 by onnxruntime, which also runs the float file. "agrees": images with the same prediction in
both. Methods that use images prune with rows 600..799 of the 800 and score.damping 4e-6 (oneshot.md); the bound of 0.5
points is for pruned models. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/int8.json and docs/results/int8.md.
"""

import copy
import tempfile
from pathlib import Path

import torch

from benchmarks.lib.deit_tiny import damped, load_dense, load_images, split
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import PruneConfig, data
from vitprune.models.export import export_onnx
from vitprune.models.int8 import IMAGES, compare_onnx, quantize_int8
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]
Variant = tuple[str, int]  # calibration and bits of the weights
CHOSEN = ("percentile", 7)
PROMISE = 0.5  # largest difference in points of top-1
CASES: list[tuple[str, float, list[Variant]]] = [
    ("lamp", 0.5, [CHOSEN, ("percentile", 8), ("minmax", 7)]),
    ("ovit", 0.5, [CHOSEN]),
    ("obc", 0.5, [CHOSEN]),
    ("dense", 0.0, [CHOSEN]),
]


def main() -> None:
    """Quantize, evaluate both files on the same images, and write the tables."""
    quick = arguments(__doc__).quick
    folder = real_data()
    torch.set_num_threads(1)
    dense = load_dense(folder)
    images, labels = load_images(folder / "imagenet-val-800.parquet", dense)
    if quick:
        images, labels = images[::8], labels[::8]
    batches = list(zip(images.split(40), labels.split(40), strict=True))
    quantization_images = calibration_images(folder / "imagenette-train-3000.parquet", dense)
    pruning_batches, _ = split(images, labels)
    rows, table = [], []
    for method, sparsity, variants in CASES[: 1 if quick else None]:
        model = copy.deepcopy(dense)
        if sparsity:
            plan = damped(PruneConfig(method=method, sparsity=sparsity))
            list(prune_cycles(model, plan, pruning_batches))
        for variant, facts in measure(model, variants[: 1 if quick else None], quantization_images, batches).items():
            off = facts["int8"] - facts["float"]
            promised = variant == CHOSEN and sparsity > 0 and not quick
            promise = (f"within {PROMISE}", abs(off) <= PROMISE) if promised else (None, None)
            label = f"{method} {sparsity:.0%}, {variant[0]}, {variant[1]}-bit weights"
            rows.append(Row(f"{label}: change", off, "points", *promise))
            rows.append(Row(f"{label}: agreement", facts["agrees"], "%"))
            # quantize_int8 raises an error if a zero is lost
            kept = f"{facts['zeros']:,} of {facts['zeros']:,}, now {facts['int8_zeros']:,}"
            sizes = f"{facts['float_bytes'] / 1e6:.1f} to {facts['bytes'] / 1e6:.1f}"
            tops = [f"{facts['float']:.2f}", f"{facts['int8']:.2f}", f"{off:+.2f}", f"{facts['agrees']:.1f} %"]
            table.append([method, f"{sparsity:.0%}", variant[0], f"{variant[1]}", *tops, kept, sizes])
            print(table[-1], flush=True)
    if not quick:
        header = ["method", "removed", "calibration", "weight bits", "float top-1 %", "INT8 top-1 %", "change"]
        header += ["agrees", "preserved zeros", "MB"]
        write_table(ROOT / "docs/results/int8.md", "INT8 after pruning", __doc__ or "", header, table)
    write_results("int8", rows, quick)


def measure(
    model: torch.nn.Module, variants: list[Variant], images: torch.Tensor, batches: list[data.Batch]
) -> dict[Variant, dict[str, float]]:
    """Quantize a model in every variant and compare each with the float file on the same images."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "float.onnx"
        size = export_onnx(model, source, batches[0][0][:2])["bytes"]
        paths = [source.with_name(f"{calibration}{bits}.onnx") for calibration, bits in variants]
        facts = [quantize_int8(source, path, images, *variant) for path, variant in zip(paths, variants, strict=True)]
        tops = compare_onnx([source, *paths], batches)
    results = {}
    for variant, path, fact in zip(variants, paths, facts, strict=True):
        top1, agrees = tops[f"{path.stem}_top1"], tops[f"{path.stem}_agrees"]
        results[variant] = fact | {"float": tops["float_top1"], "int8": top1, "agrees": agrees, "float_bytes": size}
    return results


def calibration_images(path: Path, model: torch.nn.Module) -> torch.Tensor:
    """Return equally spaced calibration images of a file."""
    source = data.open_source(f"parquet:{path}")
    transform = data.transform(data.data_config(model))
    names = source.ids[:: len(source.ids) // IMAGES][:IMAGES]
    return torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in names])


if __name__ == "__main__":
    main()
