"""The local record of a flow run: facts as JSON lines, and the small files they speak of, kept until they are mirrored.

A fact is written and on the disk before anything is sent anywhere, so a dead tracking server costs nothing.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.run_stage import StageResult
from vitprune.orchestration.summary import evaluation
from vitprune.runtime.files import sha256

SWEEP = "VITPRUNE_SWEEP"  # what a run of a sweep is told of it: key, name and run, as JSON
# What the record of a stage holds besides metrics/STAGE.json and plots/STAGE.csv; the model is kept as a folder.
KEPT = {
    "mask": ("out/mask/masks.safetensors", "out/mask/sparsity.parquet"),
    "evaluate": ("out/evaluate/evaluation.parquet", "metrics/latency.json"),
    "report": ("out/report/report.html",),
}
CURVES = {stage: f"out/{stage}/history.jsonl" for stage in ("dense", "prune", "distill")}
MODEL_STAGE, MODEL = "distill", "out/distill"
CHECKPOINT = ("config.json", "model.safetensors")
WRITTEN_BY_RUNS = ("metrics/", "plots/", "dvc.lock")  # they say nothing about the code that computed them
DIGESTS = {"dataset": "data/manifest.parquet", "calibrate": "data/calibration.parquet"}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf
        for key, below in value.items()
        for name, leaf in flatten(below, f"{prefix}.{key}" if prefix else str(key)).items()
    }


@dataclass(frozen=True)
class RunLog:
    """The record of one flow run, under PROJECT/.vitprune/journal and PROJECT/.vitprune/spool."""

    project: Path
    flow_run_id: str

    @property
    def path(self) -> Path:
        """The file of facts."""
        return self.project / STATE / "journal" / f"{self.flow_run_id}.jsonl"

    @property
    def spool(self) -> Path:
        """The folder that keeps the files, under the paths they have in the project."""
        return self.project / STATE / "spool" / self.flow_run_id

    def start(self, started: float) -> None:
        """Write down what the run begins with: params, commit, versions, dvc.yaml, params.yaml; seconds since 1970."""
        params = flatten(yaml.safe_load((self.project / "params.yaml").read_text(encoding="utf-8")) or {})
        files = [self._keep(name) for name in ("params.yaml", "dvc.yaml")]
        start = {"fact": "start", "time": started, "params": params, "git": _git(self.project), "versions": _versions()}
        if sweep := os.environ.get(SWEEP):
            start["sweep"] = json.loads(sweep)
        self._append(start | {"files": files})

    def stage(self, result: StageResult) -> None:
        """Write down how a stage went and, if it succeeded, what it left."""
        fact = {"fact": "stage", **result.as_dict()}
        if result.exit_code == 0:
            fact |= self._left_by(result.stage)
        self._append(fact)

    def end(self, status: str, error: str, ended: float) -> None:
        """Write down how the run ended (FINISHED, FAILED or KILLED); seconds since 1970."""
        files = [self._keep("dvc.lock")] if (self.project / "dvc.lock").exists() else []
        self._append({"fact": "end", "status": status, "error": error, "time": ended, "files": files})

    def _left_by(self, stage: str) -> dict[str, Any]:
        names = [f"metrics/{stage}.json", f"plots/{stage}.csv", *KEPT.get(stage, ()), *CURVES.get(stage, "").split()]
        if stage == "prune":
            names.append("plots/cycles.csv")
        metrics = _json(self.project / f"metrics/{stage}.json")
        if stage == "evaluate":
            metrics = evaluation(self.project) or metrics
        left: dict[str, Any] = {
            "files": [self._keep(name) for name in names if (self.project / name).is_file()],
            "metrics": {k: v for k, v in flatten(metrics).items() if _is_number(v)},
            "lock": _lock_entry(self.project, stage),
            "sha256": metrics.get("sha256", ""),
        }
        if stage in DIGESTS and (self.project / DIGESTS[stage]).is_file():
            left["digest"] = {"path": DIGESTS[stage], "sha256": sha256(self.project / DIGESTS[stage])}
        if stage == "prune":
            left["cycles"] = [self._cycle(path) for path in sorted((self.project / "out/cycles").glob("[0-9]*"))]
        if stage == MODEL_STAGE:
            found = [self.project / MODEL / name for name in CHECKPOINT]
            left["model"] = [self._keep(str(path.relative_to(self.project))) for path in found if path.is_file()]
        return left

    def _cycle(self, folder: Path) -> dict[str, Any]:
        metrics = _json(folder / "metrics.json")
        # not its model: DVC has that, metrics.json its digest, and the store is no place for a copy per cycle
        kept = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in CHECKPOINT]
        files = [self._keep(str(path.relative_to(self.project))) for path in kept]
        return {
            "cycle": int(folder.name),
            "metrics": {k: v for k, v in flatten(metrics).items() if _is_number(v)},
            "sha256": metrics.get("sha256", ""),
            "files": files,
        }

    def _keep(self, name: str) -> dict[str, str]:
        """Keep a file of the project in the spool; its name and digest.

        A stage replaces its files and never writes into them, so its outs are linked; the rest is copied.
        """
        source, kept = self.project / name, self.spool / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)
        try:
            if not name.startswith("out/"):
                raise OSError
            os.link(source, kept)
        except OSError:
            shutil.copyfile(source, kept)
        return {"path": name, "sha256": sha256(kept)}

    def _append(self, fact: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fact, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the facts of a journal; a last line that a kill cut off is left out."""
    facts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            facts.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return facts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _lock_entry(project: Path, stage: str) -> dict[str, Any]:
    """Return the stage's entry in dvc.lock: its own parameters and the digest of the whole entry."""
    path = project / "dvc.lock"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entry = content.get("stages", {}).get(stage, {})
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()
    return {"params": flatten(entry.get("params", {}).get("params.yaml", {})), "sha256": digest}


def _git(project: Path) -> dict[str, Any]:
    """Return the commit of the project and whether tracked files differ from it; empty outside a repository."""

    def ask(*words: str) -> str | None:
        answer = subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = ask("diff", "--name-only", "--relative", "HEAD") or ""
    return {
        "commit": commit,
        "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(changed),
        "prefix": ask("rev-parse", "--show-prefix"),
        "changed": [path for path in changed.splitlines() if not path.startswith(WRITTEN_BY_RUNS)],
    }


def _versions() -> dict[str, str]:
    """Return the versions of what computes and of what records."""
    found = {
        package: metadata.version(package) for package in ("vitprune", "torch", "timm", "dvc", "prefect", "mlflow")
    }
    return found | {"python": platform.python_version()}
