"""A project of the real stages, made by `vitprune init` and small enough to run all ten of them in about a minute."""

import subprocess
from pathlib import Path

import yaml

from vitprune.scaffold import Choice, create

ONE_EPOCH = {"epochs": 1, "batch_size": 64, "lr": 0.001}


def make(project: Path) -> Path:
    """Make a project of git and DVC with the demo's settings cut short, and commit it."""
    create(project, Choice())
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["model"]["args"]["depth"] = 2
    params["dense"]["train"] = params["prune"]["recover"] = params["distill"]["train"] = ONE_EPOCH
    params["calibrate"]["size"], params["evaluate"]["latency_runs"], params["export"]["onnx"] = 100, 5, False
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for command in ([*git, "add", "-A"], [*git, "commit", "-q", "-m", "A tiny project."]):
        subprocess.run(command, cwd=project, check=True)
    return project
