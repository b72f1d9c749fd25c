"""The demo over three seeds: a small ViT trained, pruned, recovered and distilled on scikit-learn's digits.

Top-1 on held-out images of the dense and the pruned model, and what is left of parameters and MACs. Writes
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
LEAST_DENSE, LARGEST_DROP, LARGEST_SHARE = 96.0, 1.0, 0.5


def main() -> None:
    """Run the stages for every seed and write the tables."""
    quick = arguments(__doc__).quick
    rows: list[Row] = []
    cells = []
    for seed in range(1 if quick else 3):
        found = run(seed)
        dense, pruned, kept = found["dense"], found["pruned"], found["kept"]
        drop, share = dense["top1"] - pruned["top1"], kept["macs"]
        rows += [
            Row(f"seed {seed}: dense", dense["top1"], "top-1 %", f">= {LEAST_DENSE}", dense["top1"] >= LEAST_DENSE),
            Row(f"seed {seed}: pruned", pruned["top1"], "top-1 %"),
            Row(f"seed {seed}: drop", drop, "points", f"<= {LARGEST_DROP}", drop <= LARGEST_DROP),
            Row(f"seed {seed}: MACs left", share, "of dense", f"<= {LARGEST_SHARE}", share <= LARGEST_SHARE),
            Row(f"seed {seed}: parameters left", kept["params"], "of dense"),
        ]
        figures = [dense["top1"], pruned["top1"], -drop]
        cells.append(
            [str(seed), *(f"{figure:.2f}" for figure in figures), f"{kept['macs']:.3f}", f"{kept['params']:.3f}"]
        )
    if not quick:
        header = ["seed", "dense top-1 %", "pruned top-1 %", "change", "MACs left", "parameters left"]
        write_table(ROOT / "docs/results/demo.md", "The demo over three seeds", __doc__ or "", header, cells)
    write_results("demo", rows, quick)


def run(seed: int) -> dict[str, dict[str, float]]:
    """Run the stages in a folder of their own and return metrics/evaluate.json."""
    folder = Path(tempfile.mkdtemp(prefix="vitprune-demo-"))
    try:
        params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"seed": seed}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        for stage in STAGES:
            subprocess.run([Path(sys.executable).with_name("vitprune"), stage], cwd=folder, check=True)
        found: dict[str, dict[str, float]] = json.loads((folder / "metrics/evaluate.json").read_text())
        return found
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
