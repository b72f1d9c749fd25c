"""A small project on real servers that can be reset to before any stage, run, and compared with a reference run."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support import servers, tamper_worker, tiny_project
from vitprune.orchestration.audit.rerun import CLOCK
from vitprune.orchestration.execution.dvc_cache import Store, cache_dir
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.processes import mark_of
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.tracking.journal import read_log
from vitprune.runtime.files import sha256

ROOT = Path(__file__).parents[2]
OUTPUTS = ("out", "data", "metrics", "plots")
GIT = ".gitignore"  # written by DVC


@dataclass(frozen=True)
class Toy:
    """A project, a copy of it after a reference run, and the digests and seconds of that run."""

    project: Path
    reference: Path
    servers: servers.Servers
    digests: Mapping[str, str]
    locked: Mapping[str, str]
    seconds: Mapping[str, float]

    def reset_to(self, stage: str) -> None:
        """Reset the project to the state before `stage`.

        DVC keeps the cached outputs of later stages, so that only this stage is computed.
        """
        empty(self.project)
        subprocess.run(["cp", "-a", f"{self.reference}/.", self.project], check=True)
        lock = yaml.safe_load((self.project / "dvc.lock").read_text())
        self._forget(stage, lock["stages"])
        for name in STAGES[STAGES.index(stage) :]:
            entry = lock["stages"].pop(name)
            for out in entry["outs"]:
                path = self.project / out["path"]
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.project / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))

    def _forget(self, stage: str, entries: Mapping[str, Any]) -> None:
        """Delete from DVC's cache the files that only this stage has written."""
        cache = cache_dir(self.project)
        store = Store(cache, cache)
        others = {file.md5 for file in store.files({name: e for name, e in entries.items() if name != stage})}
        for file in store.files({stage: entries[stage]}):
            if file.md5 not in others:
                store.path_of(file.md5).unlink(missing_ok=True)
        for path in (cache / "runs").glob("*/*/*"):
            if yaml.safe_load(path.read_text())["cmd"] == f"vitprune {stage}":
                path.unlink()
                path.parent.rmdir()

    def flow(self, log: Path, *words: str) -> "subprocess.Popen[bytes]":
        """Start a command of the flows, such as `run`."""
        return flow_of(self.project, self.servers.env, log, *words)

    def wait_for_stage(self, stage: str, seconds: float) -> bool:
        """Wait until a stage runs in the project or a worktree below it; return False after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(self.marked(stage)):
                return True
            time.sleep(0.2)
        return False

    def marked(self, stage: str | None = None) -> Iterator[psutil.Process]:
        """Yield the running processes of the project's flows, or only those of one stage."""
        for process in psutil.process_iter():
            directory = mark_of(process)
            if directory is not None and Path(directory).is_relative_to(self.project) and _is_running(process, stage):
                yield process

    def differences(self, branch: str = "") -> list[str]:
        """Return the differences from the reference run; of a retraining, those of its `branch`."""
        lock = self.project / "dvc.lock"
        text = output_of(self.project, "git", "show", f"{branch}:dvc.lock") if branch else lock.read_text()
        result = [f"{name}: another digest in dvc.lock" for name in differing_keys(locked(text), self.locked)]
        if not branch:
            result += [f"{name}: other bytes" for name in differing_keys(digests(self.project), self.digests)]
            status = output_of(self.project, sys.executable, "-m", "dvc", "status")
            result += [] if "up to date" in status else [f"dvc status: {' '.join(status.split())[:200]}"]
        return result + [f"{name} is locked" for name in self._locked_files()] + self._leftovers()

    def _locked_files(self) -> Iterator[str]:
        for path in sorted((self.project / STATE).glob("*lock")):
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield f"{STATE / path.name}"
        rwlock = self.project / ".dvc/tmp/rwlock"
        if rwlock.exists() and any(json.loads(rwlock.read_text() or "{}").values()):
            yield "DVC's rwlock"

    def _leftovers(self) -> list[str]:
        """Return leftover processes and partial files."""
        processes = [f"{process} is still running" for process in self.marked()]
        paths = (path for name in (*OUTPUTS, str(STATE)) for path in (self.project / name).rglob("*.partial"))
        return processes + [f"{path.relative_to(self.project)} is left over" for path in paths]

    def audit(self, run: str) -> list[str]:
        """Audit a run of MLflow; return the failed check, if any."""
        os.environ["MLFLOW_TRACKING_URI"] = self.servers.env["MLFLOW_TRACKING_URI"]
        code, output = tamper_worker.audited(self.project, run=run)
        return [] if code == 0 else [f"audit: {line}" for line in output.strip().splitlines()[-2:-1]]

    def upload(self) -> dict[str, Any]:
        """Upload the missing runs to MLflow."""
        output = self.servers.run("vitprune.cli", "sync", "--json", "--project", str(self.project), where=ROOT)
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result


def require_servers() -> None:
    """Exit with a message if the servers cannot be started here."""
    if packages := servers.missing():
        print(f"not installed: {packages}; this benchmark needs them (CONTRIBUTING.md)")
        sys.exit(0)


def create(project: Path, servers: servers.Servers, remote: servers.Remote, scratch: Path) -> Toy:
    """Make the project, run its flow once as the reference, and copy the result to `scratch`."""
    tiny_project.make_of_images(project)
    tiny_project.add_remote(project, remote.address, remote.key)
    (project / "gates.yaml").write_text(yaml.safe_dump({"max_accuracy_loss": 100.0, "alpha": None}))
    tiny_project.commit(project, "Name the team's remote and its gates.")
    toy = Toy(project, scratch / "reference", servers, {}, {}, {})
    log = scratch / "undisturbed.log"
    if toy.flow(log, "run").wait():
        sys.exit(log.read_text())
    subprocess.run(["cp", "-a", project, toy.reference], check=True)
    (journal,) = (project / STATE / "journal/uploaded").glob("*.jsonl")
    seconds = {fact["stage"]: fact["seconds"] for fact in read_log(journal) if fact["fact"] == "stage"}
    lock = (project / "dvc.lock").read_text()
    return Toy(project, toy.reference, servers, digests(project), locked(lock), seconds)


def _is_running(process: psutil.Process, stage: str | None) -> bool:
    """Return whether a process is no zombie and, if a stage is given, runs that stage."""
    try:
        running = process.status() != psutil.STATUS_ZOMBIE
        return running and (stage is None or process.cmdline()[-1:] == [stage])
    except (psutil.Error, OSError):
        return False


def flow_of(project: Path, env: Mapping[str, str], log: Path, *words: str) -> "subprocess.Popen[bytes]":
    """Start a command of the flows in a new process group; write its output to `log`."""
    command = [sys.executable, "-W", "ignore", "-m", "vitprune.cli", *(words or ("run",)), "--project", str(project)]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def digests(project: Path) -> dict[str, str]:
    """Return the sha256 of every output file of the stages, without measured times."""
    files = (path for name in OUTPUTS for path in (project / name).rglob("*") if path.is_file() and path.name != GIT)
    names = {str(path.relative_to(project)): path for path in files}
    return {name: sha256(path) for name, path in sorted(names.items()) if not name.startswith(CLOCK)}


def locked(text: str) -> dict[str, str]:
    """Return the MD5 of every output in a dvc.lock, without measured times."""
    stages = yaml.safe_load(text)["stages"].values()
    return {o["path"]: o["md5"] for stage in stages for o in stage["outs"] if not f"{o['path']}/".startswith(CLOCK)}


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ or that only one mapping has."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def empty(folder: Path) -> None:
    """Delete the contents of a folder, which may be a mount point."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def output_of(where: Path, *command: str) -> str:
    """Return the output of a command."""
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=False).stdout
