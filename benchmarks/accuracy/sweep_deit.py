"""`vitprune sweep` on DeiT-Tiny: four methods at three MACs targets, without training, and the Pareto plot.

A project with 800 ImageNet images and DeiT-Tiny's published weights, created by `vitprune init` in a scratch directory
(200 images for calibration, 600 for evaluation). Every run of `vitprune sweep` has its own worktree; all share a DVC
cache and are recorded by Prefect and MLflow. Throughput depends on the load of this machine.
Needs VITPRUNE_REAL_DATA. With --project, finished runs are kept there and not repeated. Writes
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
    """Create the project, run the sweep, and write the tables."""
    options = arguments(__doc__, {"project": ("", "directory that is kept, to continue an interrupted sweep")})
    real = real_data()
    with tempfile.TemporaryDirectory(prefix="vitprune-sweep-") as name:
        project = Path(options.project or name).resolve() / ("quick" if options.quick else "project")
        if not project.exists():
            make(project, real, options.quick)
        methods, targets = (METHODS[:2], TARGETS[:1]) if options.quick else (METHODS, TARGETS)
        goals = ",".join(f"macs={share}" for share in targets)
        command = ["-m", "vitprune.cli", "sweep", "--project", str(project), "--methods", ",".join(methods)]
        subprocess.run([sys.executable, "-P", *command, "--targets", goals], cwd=project, check=True)
        out = project / "out/sweeps/sweep"
        runs = pq.read_table(out / "sweep.parquet").to_pylist()
        if not options.quick:
            (ROOT / "docs/images").mkdir(exist_ok=True)
            shutil.copyfile(out / "pareto.png", ROOT / "docs/images/sweep.png")
            write_page(runs)
    write_results("sweep", [row for run in runs for row in rows_of(run)], options.quick)


def make(project: Path, real: Path, quick: bool) -> None:
    """Create and commit a project with real images and weights."""
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


def rows_of(run: dict[str, Any]) -> list[Row]:
    """Return the rows of one run."""
    label = f"{run['method']}, {run['target']}"
    rows = [Row(label, run["top1"], "top-1 %"), Row(f"{label}: gain", run["gain"], "of the dense throughput")]
    share = run["nonzero_macs"] / run["dense_nonzero_macs"]
    return [*rows, Row(f"{label}: MACs", share, "of the dense model's")]


def write_page(runs: list[dict[str, Any]]) -> None:
    """Write the page: one row per run; runs on the Pareto front are marked."""
    header = ["method", "target", "top-1 %", "MACs, of dense", "speed-up", "Pareto front"]
    cells = [
        [
            run["method"],
            run["target"],
            f"{run['top1']:.2f}",
            f"{run['nonzero_macs'] / run['dense_nonzero_macs']:.3f}",
            f"{run['gain']:.2f}",
            "yes" if run["front"] else "",
        ]
        for run in runs
    ]
    path = ROOT / "docs/results/sweep.md"
    write_table(path, "A sweep", f"{__doc__} Dense: {runs[0]['dense_top1']:.2f} %.", header, cells)
    path.write_text(path.read_text() + "\n![top-1 against throughput](../images/sweep.png)\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
