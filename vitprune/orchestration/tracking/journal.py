"""Local run log of a flow: one JSON line per event, with copies of the small files to upload.

Every event is written to disk before anything is sent, so nothing is lost while the tracking server is unavailable.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.orchestration.attestation.signing import signing_key
from vitprune.orchestration.attestation.statements import BUNDLE, Attestation
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.processes import dvc_in_project
from vitprune.orchestration.execution.run_stage import StageResult
from vitprune.pipeline.report.inputs import read_evaluation
from vitprune.runtime.commands import error_line, git
from vitprune.runtime.files import place_file, read_optional_json, sha256
from vitprune.runtime.yaml_files import load_yaml

SWEEP = "VITPRUNE_SWEEP"  # environment variable of a sweep's runs: key and name of the sweep, name of the run, as JSON
# Files of a stage to upload besides metrics/STAGE.json and plots/STAGE.csv.
STAGE_FILES = {
    "mask": ("out/mask/masks.safetensors", "out/mask/sparsity.parquet"),
    "evaluate": ("out/evaluate/evaluation.parquet", "metrics/latency.json"),
    "report": ("out/report/report.html",),
}
CURVES = {stage: f"out/{stage}/history.jsonl" for stage in ("dense", "prune", "distill")}
MODEL_STAGE, MODEL = "distill", "out/distill"
CHECKPOINT = ("config.json", "model.safetensors")
# changed by every run, so no uncommitted change of code
RUN_OUTPUTS = ("metrics/", "plots/", "dvc.lock", f"{BUNDLE}.dvc")
JOURNAL = "journal.jsonl"  # the run log in MLflow
DIGESTS = {"dataset": "data/manifest.parquet", "calibrate": "data/calibration.parquet"}

Keep = Callable[[str], dict[str, str]]


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
    """The log of one flow run: PROJECT/.vitprune/journal/ID.jsonl, with its files in PROJECT/.vitprune/spool/ID."""

    project: Path
    flow_run_id: str

    @property
    def path(self) -> Path:
        """The JSON lines file."""
        return self.project / STATE / "journal" / f"{self.flow_run_id}.jsonl"

    @property
    def spool(self) -> Path:
        """The folder of the files to upload, under the same relative paths as in the project."""
        return self.project / STATE / "spool" / self.flow_run_id

    @property
    def attestation(self) -> Attestation:
        """The statements of the run."""
        return Attestation(self.spool / BUNDLE, self.flow_run_id)

    def start(self, started: float) -> None:
        """Log the start (seconds since 1970): params, commit, versions, dvc.yaml and params.yaml."""
        params = flatten(load_yaml(self.project / "params.yaml") or {})
        files = [self._keep(name) for name in ("params.yaml", "dvc.yaml")]
        start = {"fact": "start", "time": started, "params": params}
        start |= {"git": _git_state(self.project), "versions": _versions()}
        if sweep := os.environ.get(SWEEP):
            start["sweep"] = json.loads(sweep)
        signing_key()  # an unusable key is an error before the first stage
        self.attestation.path.unlink(missing_ok=True)
        self._append(start | {"files": files})

    def stage(self, result: StageResult) -> None:
        """Log the result of a stage and, if it succeeded, its outputs."""
        fact = {"fact": "stage", **result.as_dict()}
        if result.exit_code == 0:
            fact |= stage_outputs(self.project, result.stage, self._keep)
        self._append(fact)
        if result.exit_code == 0:
            entry = lock_entry(self.project, result.stage)
            written = digests_of(self.project, entry.get("outs", ()), each_file=True)
            self.attestation.add_stage(fact, entry, written, digests_of(self.project, entry.get("deps", ())))

    def end(self, status: str, error: str, ended: float) -> None:
        """Log the end of the run: FINISHED, FAILED or KILLED; `ended` in seconds since 1970."""
        files = [self._keep("dvc.lock")] if (self.project / "dvc.lock").exists() else []
        end = {"fact": "end", "status": status, "error": error, "time": ended, "files": files}
        self._append(end)
        start = read_log(self.path)[0]
        digests = {file["path"]: {"sha256": file["sha256"]} for file in (*start["files"], *files)}
        self.attestation.close(start, end, digests | {JOURNAL: {"sha256": sha256(self.path)}})

    def share(self) -> str:
        """Give the statements to DVC, which pushes them with the outputs; return the reason of a failure, else ""."""
        shutil.copyfile(self.attestation.path, self.project / BUNDLE)
        completed = dvc_in_project(self.project, "add", BUNDLE)
        return f"{BUNDLE}: not added to DVC ({error_line(completed)})" if completed.returncode else ""

    def _keep(self, name: str) -> dict[str, str]:
        """Copy a file of the project into the spool; return its name and SHA-256."""
        is_output = name.startswith("out/")  # stages replace their outputs and never modify them: a link suffices
        place_file(self.project / name, self.spool / name, link=is_output)
        return {"path": name, "sha256": sha256(self.spool / name)}

    def _append(self, fact: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fact, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())


def stage_outputs(project: Path, stage: str, keep: Keep) -> dict[str, Any]:
    """Return what the run log says about the outputs of a stage: files, metrics, checksums, cycles, model.

    Args:
        project: The project's directory.
        stage: Name of the stage.
        keep: Called with the path of every file to upload; returns the path and its SHA-256.
    """
    names = [f"metrics/{stage}.json", f"plots/{stage}.csv", *STAGE_FILES.get(stage, ()), *CURVES.get(stage, "").split()]
    if stage == "prune":
        names.append("plots/cycles.csv")
    folder = project / "metrics"
    metrics = (read_evaluation(folder) if stage == "evaluate" else read_optional_json(folder / f"{stage}.json")) or {}
    entry = lock_entry(project, stage)
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()
    outputs: dict[str, Any] = {
        "files": [keep(name) for name in names if (project / name).is_file()],
        "metrics": _numbers(metrics),
        "lock": {"params": flatten(entry.get("params", {}).get("params.yaml", {})), "sha256": digest},
        "sha256": metrics.get("sha256", ""),
    }
    if stage in DIGESTS and (project / DIGESTS[stage]).is_file():
        outputs["digest"] = {"path": DIGESTS[stage], "sha256": sha256(project / DIGESTS[stage])}
    if stage == "prune":
        outputs["cycles"] = [_cycle(project, path, keep) for path in sorted((project / "out/cycles").glob("[0-9]*"))]
    if stage == MODEL_STAGE:
        paths = [project / MODEL / name for name in CHECKPOINT]
        outputs["model"] = [keep(str(path.relative_to(project))) for path in paths if path.is_file()]
    return outputs


def _cycle(project: Path, folder: Path, keep: Keep) -> dict[str, Any]:
    metrics = read_optional_json(folder / "metrics.json") or {}
    # without the model: DVC has it, and metrics.json its SHA-256
    kept = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in CHECKPOINT]
    return {
        "cycle": int(folder.name),
        "metrics": _numbers(metrics),
        "sha256": metrics.get("sha256", ""),
        "files": [keep(str(path.relative_to(project))) for path in kept],
    }


def lock_entry(project: Path, stage: str) -> dict[str, Any]:
    """Return a stage's entry in dvc.lock; empty if there is none."""
    path = project / "dvc.lock"
    content = load_yaml(path) if path.is_file() else {}
    entry: dict[str, Any] = content.get("stages", {}).get(stage, {})
    return entry


def digests_of(project: Path, files: Iterable[Mapping[str, Any]], each_file: bool = False) -> dict[str, dict[str, str]]:
    """Return the MD5 of the files in an entry of dvc.lock, and their SHA-256; a folder has the MD5 of DVC's list.

    Args:
        project: The project's directory.
        files: The outputs or the dependencies.
        each_file: Also return the SHA-256 of every file in a folder.
    """
    digests: dict[str, dict[str, str]] = {}
    for file in files:
        path = project / file["path"]
        digests[file["path"]] = {"md5": str(file.get("md5"))} | ({"sha256": sha256(path)} if path.is_file() else {})
        if each_file and path.is_dir():
            below = (file for file in path.rglob("*") if file.is_file())
            digests |= {file.relative_to(project).as_posix(): {"sha256": sha256(file)} for file in below}
    return digests


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run log, without a last line truncated by a kill.

    Raises:
        BadInput: another line is not an event.
    """
    lines, facts = path.read_bytes().splitlines(), list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        try:
            fact = json.loads(line)
            if not isinstance(fact, dict) or not isinstance(fact.get("fact"), str):
                raise ValueError
            facts.append(fact)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise BadInput(f"{path}: line {number} is not an event of a run log; move the file away") from None
    return facts


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flatten(metrics).items() if isinstance(value, int | float)}


def _git_state(project: Path) -> dict[str, Any]:
    """Return commit, branch and changed files of a project; empty outside git and before the first commit."""
    head = git(project, "rev-parse", "--verify", "HEAD")
    if head.returncode:
        return {}
    listed = git(project, "diff", "-z", "--name-only", "--relative", "HEAD").stdout
    changed = [name.encode("utf-8", "backslashreplace").decode() for name in listed.split("\0") if name]
    return {
        "commit": head.stdout.strip(),
        "branch": git(project, "rev-parse", "--abbrev-ref", "HEAD").stdout.strip(),
        "dirty": bool(changed),
        "prefix": git(project, "rev-parse", "--show-prefix").stdout.strip(),
        "changed": [path for path in changed if not path.startswith(RUN_OUTPUTS)],
    }


def _versions() -> dict[str, str]:
    """Return the versions of the packages that compute and record."""
    packages = ("vitprune", "torch", "timm", "dvc", "prefect", "mlflow")
    return {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}
