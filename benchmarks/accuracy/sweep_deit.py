"""A sweep of the real stages: four methods on DeiT-Tiny at three shares of its MACs, without training, and its picture.

A project of the 800 real ImageNet images and DeiT-Tiny's published weights, made by `vitprune init` in a scratch folder
(200 images calibrate, 600 evaluate), and in it `vitprune sweep`: every run has a worktree of its own, all share a DVC
cache, and Prefect and MLflow record them. Throughput is that of this machine beside whatever else it did.
Needs VITPRUNE_REAL_DATA; every run that has ended is kept under --project, if one is given, and not run again. Writes
benchmarks/results/sweep.json, docs/results/sweep.md and docs/images/sweep.png.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from benchmarks.lib.toy_project import ROOT, tiny_project
from vitprune.pipeline.project_template import Choice, create_project

MODEL = "deit_tiny_patch16_224"
METHODS = ("channel-magnitude", "channel-taylor", "upvits", "unit-obs")
TARGETS = (0.85, 0.7, 0.5)


def main() -> None:
    """Make the project, sweep it, and write the tables."""
    asked = arguments(__doc__, {"project": ("", "where it is made, to go on after a break; else a folder for once")})
    real = real_data()
    with tempfile.TemporaryDirectory(prefix="vitprune-sweep-") as name:
        project = Path(asked.project or name).resolve() / ("quick" if asked.quick else "project")
        if not project.exists():
            make(project, real, asked.quick)
        methods, targets = (METHODS[:2], TARGETS[:1]) if asked.quick else (METHODS, TARGETS)
        goals = ",".join(f"macs={share}" for share in targets)
        command = ["-m", "vitprune.cli", "sweep", "--project", str(project), "--methods", ",".join(methods)]
        subprocess.run([sys.executable, "-P", *command, "--targets", goals], cwd=project, check=True)
        out = project / "out/sweeps/sweep"
        found = pq.read_table(out / "sweep.parquet").to_pylist()
        if not asked.quick:
            (ROOT / "docs/images").mkdir(exist_ok=True)
            shutil.copyfile(out / "pareto.png", ROOT / "docs/images/sweep.png")
            write_page(found)
    write_results("sweep", [row for one in found for row in rows_of(one)], asked.quick)


def make(project: Path, real: Path, quick: bool) -> None:
    """A project of real images and weights, committed."""
    create_project(project, Choice(f"parquet:{real / 'imagenet-val-800.parquet'}", MODEL))
    path = project / "params.yaml"
    params: dict[str, Any] = yaml.safe_load(path.read_text())
    params["dataset"] |= {"classes": None, "eval_source": None, "eval_fraction": 0.95 if quick else 0.75}
    params["model"]["args"], params["threads"] = {}, 1
    params["dense"] = {"start": "checkpoint", "checkpoint": str(real / f"{MODEL}.safetensors"), "train": None}
    params["calibrate"] = {"size": None, "balance": "uniform"}
    params["prune"] |= {"cycles": 1, "finetune": None, "sparsity": None, "target": {"macs": 0.7}}
    params["distill"]["train"] = None
    params["evaluate"] = {"batch_size": 50, "latency_batch": 8, "latency_runs": 3 if quick else 20}
    params["export"] = {"onnx": False}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    tiny_project.commit(project, "A project.")


def rows_of(found: dict[str, Any]) -> list[Row]:
    """The figures of one run."""
    label = f"{found['method']}, {found['target']}"
    rows = [Row(label, found["top1"], "top-1 %"), Row(f"{label}: gain", found["gain"], "of the dense throughput")]
    share = found["nonzero_macs"] / found["dense_nonzero_macs"]
    return [*rows, Row(f"{label}: MACs", share, "of the dense model's")]


def write_page(found: list[dict[str, Any]]) -> None:
    """The document: a line per run, those that nothing beats marked."""
    header = ["method", "target", "top-1 %", "MACs, of the dense", "times as fast", "nothing beats it"]
    cells = [
        [
            one["method"],
            one["target"],
            f"{one['top1']:.2f}",
            f"{one['nonzero_macs'] / one['dense_nonzero_macs']:.3f}",
            f"{one['gain']:.2f}",
            "yes" if one["front"] else "",
        ]
        for one in found
    ]
    path = ROOT / "docs/results/sweep.md"
    write_table(path, "A sweep", f"{__doc__} Dense: {found[0]['dense_top1']:.2f} %.", header, cells)
    path.write_text(path.read_text() + "\n![top-1 against throughput](../images/sweep.png)\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
