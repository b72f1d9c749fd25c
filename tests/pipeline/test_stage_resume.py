"""Stages that are killed at any moment and run again give the result of an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vitprune import data, models
from vitprune.config.params import load_params
from vitprune.errors import BadInput
from vitprune.pipeline import stages
from vitprune.pipeline.project_data import open_images
from vitprune.runtime.files import sha256
from vitprune.training.checkpoint import INTERVAL_ENV, Checkpointer
from vitprune.training.checkpoint_store import CheckpointStore

ROOT = Path(__file__).parents[2]
RECIPE = {"epochs": 2, "batch_size": 512, "lr": 0.002, "augment": "digits", "ema": 0.9, "cutmix": 0.5, "mixup": 0.2}
KEPT = Path(".vitprune/resume")


class Broken(BaseException):
    """Simulates a kill: nothing is executed after it."""


def project_in(path: Path, **prune: object) -> Path:
    """Create a project with a minimal model and run the stages up to `mask`."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    depth = 2 if "merge_tokens" in prune else 1
    params["model"]["args"] |= {"depth": depth, "embed_dim": 24, "num_heads": 3, "patch_size": 16}
    params["dense"]["train"], params["calibrate"]["size"] = RECIPE | {"epochs": 1}, 50
    params["prune"] |= {"cycles": 3, "finetune": RECIPE | {"optimizer_state": "keep", "decay_over": "run"}} | prune
    params["distill"]["train"] = RECIPE
    path.mkdir()
    (path / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("dataset", "dense", "calibrate", "score", "mask"):
        stages.run(stage, path)
    return path


def written(project: Path) -> dict[str, str]:
    files = [path for name in ("out", "metrics", "plots") for path in (project / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(project)): sha256(path) for path in files}


def emptied(project: Path, stage: str) -> None:
    """Remove the outputs of a stage, as DVC does before it runs the stage again."""
    for name in ("out/prune", "out/cycles") if stage == "prune" else (f"out/{stage}",):
        shutil.rmtree(project / name, ignore_errors=True)


def ends(project: Path) -> dict[str, str]:
    for stage in ("prune", "distill"):
        stages.run(stage, project)
    assert list((project / KEPT).iterdir()) == []
    return written(project)


@pytest.mark.parametrize(
    "prune",
    [
        {},
        {"method": "ovit", "sparsity": 0.6, "correct_norms": True, "reconstruct": {"passes": 2, "batch_size": 20}},
        {"method": "upvits", "sparsity": {"ffn": 0.4, "attention": 0.5}, "merge_heads_to": 1, "target": {"macs": 0.6}},
        {"method": "unit-obs", "kinds": ["residual"], "sparsity": {"residual": 0.5}, "rotate_residual": True},
        {"merge_tokens": 1, "correct_norms": True},
    ],
    ids=["taylor", "ovit", "upvits", "rotated", "merged"],
)
def test_stages_interrupted_at_file_writes_give_identical_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prune: dict
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(INTERVAL_ENV, "0")
    project = project_in(tmp_path / "project", **prune)
    expected = ends(project)
    remaining, save = [0], CheckpointStore.save

    def breaking(*args, **kwargs):
        saved = save(*args, **kwargs)
        remaining[0] -= 1
        if not remaining[0]:
            raise Broken
        return saved

    monkeypatch.setattr(CheckpointStore, "save", breaking)
    for stage, number in [("prune", 1), ("prune", 4), ("prune", 8), ("distill", 2)]:
        emptied(project, stage)
        remaining[0] = number
        with pytest.raises(Broken):
            stages.run(stage, project)
        if (stage, number) in [("prune", 8), ("distill", 2)]:
            emptied(project, stage)
            stages.run(stage, project)
    assert written(project) == expected
    assert list((project / KEPT).iterdir()) == []


def test_a_lost_cycle_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(INTERVAL_ENV, "0")
    project = project_in(tmp_path / "project")
    expected, write, remaining = ends(project), Checkpointer.write, [8]

    def breaking(saver, snapshot):
        write(saver, snapshot)
        remaining[0] -= 1
        if not remaining[0]:
            raise Broken

    monkeypatch.setattr(Checkpointer, "write", breaking)
    with pytest.raises(Broken):
        stages.run("prune", project)
    (work,) = (project / KEPT).iterdir()
    assert sorted(path.name for path in work.iterdir()) == [
        "01-done",
        "01-pruned",
        "01-training",
        "02-pruned",
        "02-training",
    ]
    weights = work / "01-done/000001/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    emptied(project, "prune")
    starts = remaining[0] = 0
    assert ends(project) == expected
    assert starts == 0
    assert f"{weights.relative_to(project)}: checksum mismatch; ignored" in capsys.readouterr().err


def test_other_settings_start_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project = project_in(tmp_path / "project", finetune=None)
    monkeypatch.setenv(INTERVAL_ENV, "0")
    stages.run("prune", project)
    keys = set()
    monkeypatch.setattr(Checkpointer, "write", lambda saver, snapshot: (_ for _ in ()).throw(Broken))
    for lr in (0.002, 0.003, 0.002):
        params = yaml.safe_load((project / "params.yaml").read_text())
        params["distill"]["train"]["lr"] = lr
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        with pytest.raises(Broken):
            stages.run("distill", project)
        keys |= {path.name for path in (project / KEPT).iterdir()}
    assert len(keys) == 2


def test_a_bad_batch_is_named_and_the_last_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(INTERVAL_ENV, "0")
    project = project_in(tmp_path / "project")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["prune"]["finetune"] |= {"lr": 1e30, "clip": None, "ema": 0.0, "optimizer": "sgd"}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(BadInput, match=r"^recovery after cycle 1, epoch 1, step 2: the loss is ") as refused:
        stages.run("prune", project)
    message = str(refused.value)
    assert "\n" not in message
    table = open_images("train", models.load("out/dense"), load_params(Path("params.yaml")))
    ids = data.batch_ids(table, 512, 1000, 0, 1)
    assert f"; its images: {', '.join(ids[:8])} and 504 more; the last checkpoint is {KEPT}/prune-" in message
    images, _ = list(data.train_batches(table, 512, 1000, 0))[1]
    assert len(ids) == len(images) == len(set(ids))


def start(project: Path, stage: str, every: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), INTERVAL_ENV: every, "VITPRUNE_DEVICE": "cpu"}
    command = [sys.executable, "-m", "vitprune.cli", stage, "-C", str(project)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def kept_in(project: Path, name: str) -> int:
    """Return the number of the latest checkpoint."""
    return max((int(path.name) for path in (project / KEPT).glob(f"*/{name}/*") if path.name.isdecimal()), default=0)


def wait_for(process: subprocess.Popen[str], happened) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sigkill_and_sigterm_while_a_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project = project_in(tmp_path / "project", cycles=2, finetune=RECIPE | {"epochs": 3})
    expected = ends(project)
    emptied(project, "prune")
    killed = start(project, "prune", "0")  # SIGKILL, with a checkpoint after every step
    wait_for(killed, lambda: kept_in(project, "02-training") > 2)
    killed.kill()
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    emptied(project, "prune")
    ended = start(project, "prune", "60")  # SIGTERM, long before the next is due
    wait_for(ended, lambda: lines(project / "out/prune/history.jsonl") > 4)
    ended.terminate()
    message = ended.communicate(timeout=300)[1]
    assert ended.returncode == 143, message
    assert message.splitlines()[-1].startswith("Error: stopped by a signal, checkpoint saved at epoch ")
    assert message.count("Error") == 1
    emptied(project, "prune")
    stages.run("prune", project)
    assert written(project) == expected
    assert json.loads((project / "metrics/prune.json").read_text())["cycles"] == 2
