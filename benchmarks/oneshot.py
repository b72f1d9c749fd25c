"""One-shot pruning of DeiT-Tiny without any training: top-1 of every method at several sparsities.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; a figure per row, on the same images.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/oneshot.json and docs/results/oneshot.md.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Row, arguments, real_data, write_results, write_table

from vitprune import data, models, plan_for
from vitprune.compress import compress
from vitprune.evaluate import accuracy, count

ROOT = Path(__file__).parent.parent
DENSE_ALL, TOLERANCE = 81.1, 0.2


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    method: str
    sparsity: float | dict[str, float]
    scope: str | None = None

    @property
    def label(self) -> str:
        """What is removed, in words."""
        scope = f", {self.scope}" if self.scope else ""
        if isinstance(self.sparsity, float):
            return f"{self.sparsity:.0%} of weights{scope}"
        return ", ".join(f"{share:.0%} of {kind}" for kind, share in self.sparsity.items()) + scope


def cases(quick: bool) -> list[Case]:
    """The rows of the table; the quick form has one sparsity of each."""
    weights = [0.5] if quick else [0.3, 0.5, 0.6]
    units = [0.25] if quick else [0.1, 0.25, 0.5]
    methods = ["random", "uniform", "magnitude", "lamp", "dimap", "taylor"]
    rows = [Case(method, share) for method in methods for share in weights]
    rows += [Case("n:m", 0.5, "2:4")]
    structured = ["channel-magnitude", "channel-taylor"]
    scopes = [None] if quick else [None, "global"]
    return rows + [Case(method, {"ffn": share}, scope) for method in structured for scope in scopes for share in units]


def main() -> None:
    """Measure every case and write the tables."""
    quick = arguments(__doc__).quick
    folder = real_data()
    dense = models.create("deit_tiny_patch16_224", checkpoint=folder / "deit_tiny_patch16_224.safetensors").eval()
    images, labels = load_images(folder / "imagenet-val-800.parquet", dense)
    calibration = [(images[row : row + 50], labels[row : row + 50]) for row in range(600, 800, 50)]
    held_out = [(images[row : row + 100], labels[row : row + 100]) for row in range(0, 600, 100)]
    everything = accuracy(dense, [*held_out, *calibration])[0]["top1"]
    off = abs(everything - DENSE_ALL)
    rows = [Row("dense, all 800 images", everything, "top-1 %", f"{DENSE_ALL} +- {TOLERANCE}", off <= TOLERANCE)]
    base = accuracy(dense, held_out)[0]["top1"]
    rows.append(Row("dense, evaluation images", base, "top-1 %"))
    table = [("dense", "", base, 0.0, 1.0, 1.0)]
    for case in cases(quick):
        model = copy.deepcopy(dense)
        for _ in compress(model, plan_for(case.method, case.sparsity, case.scope), calibration):
            pass
        top1, cost, whole = accuracy(model, held_out)[0]["top1"], count(model, images[:1]), count(dense, images[:1])
        shares = cost.nonzero_params / whole.params, cost.nonzero_macs / whole.macs
        table.append((case.method, case.label, top1, top1 - base, *shares))
        rows.append(Row(f"{case.method}, {case.label}", top1, "top-1 %"))
    if not quick:
        header = ["method", "removed", "top-1 %", "change", "non-zero params", "non-zero MACs"]
        cells = [[m, what, f"{a:.1f}", f"{d:+.1f}", f"{p:.2f}x", f"{c:.2f}x"] for m, what, a, d, p, c in table]
        about = __doc__ or ""
        write_table(
            ROOT / "docs/results/oneshot.md", "One-shot pruning of DeiT-Tiny, no training", about, header, cells
        )
    write_results("oneshot", rows, quick)


def load_images(path: Path, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a Parquet file in its own order, as the model's evaluation transform gives them."""
    source = data.open_source(f"parquet:{path}")
    transform = data.transform(data.data_config(model))
    images = torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in source.ids])
    return images, torch.tensor(source.labels)


if __name__ == "__main__":
    main()
