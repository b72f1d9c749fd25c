"""The digits demo over three seeds: a small ViT is trained, pruned, fine-tuned and distilled on scikit-learn's digits.

Top-1 of the dense and the pruned model on held-out images, and the remaining parameters and MACs. Writes
benchmarks/results/demo.json and docs/results/demo.md.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.lib.results import Row, arguments, write_results, write_table

ROOT = Path(__file__).parents[2]
STAGES = ("dataset", "dense", "calibrate", "score", "mask", "prune", "distill", "evaluate")
MIN_DENSE, MAX_DROP, MAX_MACS = 96.0, 1.0, 0.5


def main() -> None:
    """Run the stages for every seed and write the tables."""
    quick = arguments(__doc__).quick
    rows: list[Row] = []
    cells = []
    for seed in range(1 if quick else 3):
        metrics = run(seed)
        dense, pruned, kept = metrics["dense"], metrics["pruned"], metrics["kept"]
        drop, macs = dense["top1"] - pruned["top1"], kept["macs"]
        rows += [
            Row(f"seed {seed}: dense", dense["top1"], "top-1 %", f">= {MIN_DENSE}", dense["top1"] >= MIN_DENSE),
            Row(f"seed {seed}: pruned", pruned["top1"], "top-1 %"),
            Row(f"seed {seed}: drop", drop, "points", f"<= {MAX_DROP}", drop <= MAX_DROP),
            Row(f"seed {seed}: remaining MACs", macs, "of dense", f"<= {MAX_MACS}", macs <= MAX_MACS),
            Row(f"seed {seed}: remaining parameters", kept["params"], "of dense"),
        ]
        figures = [dense["top1"], pruned["top1"], -drop]
        cells.append(
            [str(seed), *(f"{figure:.2f}" for figure in figures), f"{kept['macs']:.3f}", f"{kept['params']:.3f}"]
        )
    if not quick:
        header = ["seed", "dense top-1 %", "pruned top-1 %", "change", "remaining MACs", "remaining parameters"]
        write_table(ROOT / "docs/results/demo.md", "The demo over three seeds", __doc__ or "", header, cells)
    write_results("demo", rows, quick)


def run(seed: int) -> dict[str, dict[str, float]]:
    """Run the stages in a temporary directory and return metrics/evaluate.json."""
    folder = Path(tempfile.mkdtemp(prefix="vitprune-demo-"))
    try:
        params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"seed": seed}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        for stage in STAGES:
            subprocess.run([Path(sys.executable).with_name("vitprune"), stage], cwd=folder, check=True)
        metrics: dict[str, dict[str, float]] = json.loads((folder / "metrics/evaluate.json").read_text())
        return metrics
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
