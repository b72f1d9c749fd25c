"""A project of the real stages, small enough to run all ten of them in about a minute."""

import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parent.parent
ONE_EPOCH = {"epochs": 1, "batch_size": 64, "lr": 0.001}


def make(project: Path) -> Path:
    """Make a project of git and DVC with the stages of dvc.yaml, for the installed package."""
    project.mkdir()
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["model"]["args"]["depth"] = 2
    params["dense"]["train"] = params["prune"]["recover"] = params["distill"]["train"] = ONE_EPOCH
    params["calibrate"]["size"], params["evaluate"]["latency_runs"], params["export"]["onnx"] = 100, 5, False
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    pipeline = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
    for stage in pipeline["stages"].values():
        stage["deps"] = ["requirements.txt", *(dep for dep in stage["deps"] if not dep.startswith("vitprune/"))]
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (project / "requirements.txt").write_text("vitprune\n")
    (project / ".gitignore").write_text("/out/\n/metrics/\n/plots/\n/data/\n/.vitprune/\n/ml*\n")
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for command in ([*git, "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], [*git, "add", "-A"]):
        subprocess.run(command, cwd=project, check=True)
    (project / ".dvc/config").write_text((REPOSITORY / ".dvc/config").read_text())
    subprocess.run([*git, "commit", "-q", "-m", "A tiny project."], cwd=project, check=True)
    return project
