"""A project of the real stages, created by `vitprune init`; all ten stages run in about a minute."""

import contextlib
import json
import subprocess
import time
from pathlib import Path

import yaml

from tests.support import preloaded
from tests.support.shared import add_empty_store, shared
from vitprune import data
from vitprune.orchestration.execution.processes import process_environment
from vitprune.orchestration.execution.run_stage import STAGES, StageResult
from vitprune.orchestration.tracking.journal import RunLog
from vitprune.pipeline import stages
from vitprune.pipeline.project_template import Choice, create_project
from vitprune.pipeline.report.page import write_report

ONE_EPOCH = {"epochs": 1, "batch_size": 64, "lr": 0.001}


def make(project: Path) -> Path:
    """Create and commit a git and DVC project with shortened settings of the demo."""
    create_project(project, Choice())
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["model"]["args"]["depth"] = 2
    params["dense"]["train"] = params["prune"]["finetune"] = params["distill"]["train"] = ONE_EPOCH
    params["calibrate"]["size"], params["evaluate"]["latency_runs"], params["export"]["onnx"] = 100, 5, False
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    commit(project, "A tiny project.")
    return project


def make_of_images(project: Path, size: int = 240) -> Path:
    """Create and commit an even smaller project whose images are tracked by DVC."""
    write_images(project / "images", range(size))
    create_project(project, Choice(f"folder:{project / 'images'}", "vit_tiny_patch16_224", "channel-taylor"))
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    args = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    params["threads"], params["seed"], params["model"]["args"] = 1, 0, args | {"num_classes": 10}
    params["dense"] = {"start": "train", "train": ONE_EPOCH | {"epochs": 8}}
    params["prune"] |= {"sparsity": {"ffn": 0.5, "attention": 0.5}, "cycles": 2, "finetune": ONE_EPOCH}
    params["distill"]["train"], params["calibrate"]["size"] = ONE_EPOCH, 60
    params["evaluate"] = {"batch_size": 64, "latency_batch": 1, "latency_runs": 5}
    params["export"] = {"onnx": False}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    dvc(project, "add", "-q", "images")
    commit(project, "A tiny project of images.")
    return project


def run_stages(project: Path, first: str = STAGES[0]) -> Path:
    """Run all stages from the first one in this process, for speed, and commit their outputs to DVC."""
    with contextlib.chdir(project):
        for stage in STAGES[STAGES.index(first) : -1]:
            stages.run(stage, project)
    write_report(project, project / "out/report/report.html")
    dvc(project, "commit", "-q", "--force")
    return project


def finished() -> Path:
    """Return a project of images whose ten stages have run, with an empty MLflow store.

    It is shared by all test processes: copy it, do not change it.
    """
    return shared("finished", _build_finished) / "project"


def _build_finished(folder: Path) -> None:
    add_empty_store(run_stages(make_of_images(folder / "project")))


def record(project: Path, name: str, cached: bool = False) -> RunLog:
    """Write the run log of a flow that produced the current state of the project."""
    journal = RunLog(project, name)
    journal.start(time.time())
    for stage in STAGES:
        journal.stage(StageResult(stage, cached, time.time(), 1.5, 0))
    journal.end("FINISHED", "", time.time())
    return journal


def upload(project: Path, uri: str | None = None) -> str:
    """Upload the recorded runs to MLflow and return the id of the newest."""
    env = process_environment(project) | ({"MLFLOW_TRACKING_URI": uri} if uri else {})
    result = preloaded.run("vitprune.cli", "sync", "--json", "--project", str(project), cwd=project, env=env)
    assert result.returncode == 0, result.stderr
    return str(json.loads(result.stdout.splitlines()[-1])["run_id"])


def write_images(folder: Path, numbers: range) -> None:
    """Write some of the digits as FOLDER/CLASS/NUMBER.png."""
    digits = data.open_source("digits")
    for number in numbers:
        path = folder / str(digits.labels[number]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(digits.read(digits.ids[number]))


def dvc(project: Path, *words: str) -> str:
    """Run DVC in a project and return what it printed."""
    result = preloaded.run("dvc", *words, cwd=project, env=process_environment(project))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def add_remote(project: Path, url: str, keyfile: Path | str = "") -> None:
    """Add DVC's default remote `team`, with the SSH key that opens it, if any."""
    dvc(project, "remote", "add", "-d", "team", url)
    if keyfile:
        set_remote_key(project, keyfile)


def set_remote_key(project: Path, keyfile: Path | str) -> None:
    """Set the SSH key of the remote `team` in .dvc/config.local, which git ignores."""
    dvc(project, "remote", "modify", "--local", "team", "keyfile", str(keyfile))


def commit(project: Path, message: str) -> None:
    """Commit all changes."""
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for command in ([*git, "add", "-A"], [*git, "commit", "-q", "-m", message]):
        subprocess.run(command, cwd=project, check=True)
