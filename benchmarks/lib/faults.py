"""Faults of the fault-injection benchmark: how each is injected and repaired, and the runs that it interrupts."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.lib import toy_project
from benchmarks.lib.toy_project import STAGES, Toy, servers
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.processes import kill_tree
from vitprune.orchestration.tracking.store import short_timeouts

DISK = "256m"
BALLAST = "ballast"
ZOMBIES = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "VITPRUNE_ZOMBIE_SECONDS": "90"}
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, output, and the line with the error message."""

    code: int
    output: str
    line: str

    @property
    def clear(self) -> bool:
        """Whether it succeeded, or failed with a one-line message and without a traceback."""
        return self.code == 0 or bool(self.line and "Traceback" not in self.output)


@dataclass
class Site:
    """The toy project on its disk, the servers, the DVC remote and the worker process."""

    toy: Toy
    disk: Path
    servers: servers.Servers
    remote: servers.Remote
    scratch: Path
    stack: contextlib.ExitStack
    metrics: dict[str, list[str]] = field(default_factory=dict)
    worker: "subprocess.Popen[bytes] | None" = None
    count: int = 0

    def log(self, name: str) -> Path:
        """Return a new log file for a run."""
        self.count += 1
        return self.scratch / f"{self.count:03d}-{name}.log"

    def start_worker(self) -> None:
        """Start a worker unless one is running."""
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self.stack.enter_context(self.servers.worker(self.scratch / "worker.log"))

    def running(self) -> list[str]:
        """Return the runs that Prefect still reports as running, after waiting up to four minutes."""
        query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "limit": 200}
        deadline = time.monotonic() + 240
        while runs := self.servers.ask("/flow_runs/filter", query):
            if time.monotonic() > deadline:
                break
            time.sleep(2)
        return [run["name"] for run in runs]

    def client(self) -> MlflowClient:
        """Return a client of the MLflow server."""
        return MlflowClient(tracking_uri=self.servers.env["MLFLOW_TRACKING_URI"])

    def recorded(self, run: "Run") -> list[str]:
        """Return what is missing in MLflow for a successful run, and what the audit reports."""
        flow = run.flow()
        with short_timeouts(60):
            if self.toy.upload()["missed"]:
                return ["the upload to MLflow failed"]
            names = self.metric_names(flow)
            (parent,) = self.search_runs(f"tags.`vitprune.key` = '{flow}'")
        incomplete = toy_project.differing_keys(names, self.metrics)
        problems = [f"{stage}: metrics in MLflow are not complete" for stage in incomplete]
        return problems + self.toy.audit(parent.info.run_id)

    def metric_names(self, flow: str) -> dict[str, list[str]]:
        """Return the metric names of a flow's run and of its stages' runs, including cached stages."""
        rows = self.search_runs(f"tags.`vitprune.prefect_flow_run_id` = '{flow}'")
        names = {row.data.tags["vitprune.key"].partition("/")[2]: sorted(self._metrics_of(row)) for row in rows}
        return {stage: metrics for stage, metrics in names.items() if stage in ("", *STAGES)}

    def _metrics_of(self, run: Any) -> set[str]:
        source = run.data.tags.get("vitprune.computed_by")
        return {*run.data.metrics, *(self.client().get_run(source).data.metrics if source else ())}

    def search_runs(self, query: str) -> list[Any]:
        """Return the MLflow runs that match a query."""
        client = self.client()
        experiment = client.get_experiment_by_name("vitprune")
        return list(client.search_runs([experiment.experiment_id], query, max_results=200))


@dataclass
class Run:
    """A run started by a `vitprune` command."""

    toy: Toy
    process: "subprocess.Popen[bytes]"
    log: Path
    branch: str = ""
    was_killed: bool = False

    def wait(self, seconds: float) -> bool:
        """Wait for the end; return False after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def kill(self) -> None:
        """Kill the flow process only, not its children."""
        self.was_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> Outcome:
        """Return how it ended."""
        output = self.log.read_text()
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error: ")] or (lines[-1:] if self.branch else [])
        return Outcome(self.process.wait(), output, errors[-1] if errors else "")

    def flow(self) -> str:
        """Return the id of its flow run, which is its key in MLflow."""
        if not self.branch:
            journals = (self.toy.project / STATE / "journal").rglob("*.jsonl")
            return max(journals, key=lambda path: path.stat().st_mtime_ns).stem
        message = toy_project.output_of(self.toy.project, "git", "log", "-1", "--format=%B", self.branch)
        client = MlflowClient(tracking_uri=self.toy.servers.env["MLFLOW_TRACKING_URI"])
        run = client.get_run(re.findall(r"^MLflow-Run: (\w+)$", message, re.M)[0])
        return str(run.data.tags["vitprune.key"])


@dataclass
class DeployedRun:
    """A run of the deployment `compress`, executed by the worker."""

    toy: Toy
    id: str
    branch: str = ""
    was_killed: bool = False

    def _state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            (run,) = self.toy.servers.ask("/flow_runs/filter", {"flow_runs": {"id": {"any_": [self.id]}}})
            return dict(run["state"])
        return {"type": "UNKNOWN", "message": "", "name": "UNKNOWN"}

    def wait(self, seconds: float) -> bool:
        """Wait for the end; return False after `seconds`. Do not wait for a killed run."""
        deadline = time.monotonic() + seconds
        while not self.was_killed and self._state()["type"] not in ENDED:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def kill(self) -> None:
        """Mark the run as killed; only its worker is a process."""
        self.was_killed = True

    def outcome(self) -> Outcome:
        """Return how it ended."""
        state = self._state()
        message = str(state.get("message") or state["name"])
        return Outcome(int(state["type"] != "COMPLETED"), message, message.splitlines()[0])

    def flow(self) -> str:
        """Return the id of the flow run."""
        return self.id


@dataclass(frozen=True)
class FaultSpec:
    """A fault: how the run is started, how the fault is injected, and how it is repaired."""

    launcher: Callable[[Site, str], Any]
    inject: Callable[[Site, Any], None]
    repair: Callable[[Site], None]


def by_command(site: Site, stage: str) -> Run:
    """Start `vitprune run`."""
    log = site.log("flow")
    return Run(site.toy, site.toy.flow(log, "run"), log)


def by_retraining(site: Site, stage: str) -> Run:
    """Start `vitprune retrain` for a new model name, without cached stages."""
    (site.toy.project / "dvc.lock").unlink(missing_ok=True)
    log, name = site.log("retrain"), f"drill-{stage}"
    process = site.toy.flow(log, "retrain", "--model", name, "--branch", name)
    return Run(site.toy, process, log, name)


def by_worker(site: Site, stage: str) -> DeployedRun:
    """Start a run of the deployment `compress`."""
    site.start_worker()
    (deployment,) = site.servers.ask("/deployments/filter", {"deployments": {"name": {"any_": ["compress"]}}})
    run = site.servers.ask(f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    return DeployedRun(site.toy, run["id"])


def kill_worker(site: Site, run: DeployedRun) -> None:
    """Kill the worker and all its child processes."""
    assert site.worker is not None
    kill_tree(site.worker.pid)
    site.worker.wait()
    run.kill()


def reset(site: Site, run: DeployedRun) -> None:
    """Kill the worker and all servers."""
    kill_worker(site, run)
    for name in ("prefect", "mlflow", "db"):
        site.servers.kill(name)


def fill(site: Site, run: Any) -> None:
    """Fill the disk completely."""
    with contextlib.suppress(OSError), (site.disk / BALLAST).open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def nothing(site: Site) -> None:
    """Repair nothing."""


FAULTS: dict[str, FaultSpec] = {
    "worker killed": FaultSpec(by_worker, kill_worker, nothing),
    "machine reset": FaultSpec(by_worker, reset, lambda site: site.servers.up()),
    "flow killed": FaultSpec(by_command, lambda site, run: run.kill(), nothing),
    "Prefect killed": FaultSpec(by_command, lambda site, run: site.servers.kill("prefect"), lambda s: s.servers.up()),
    "MLflow killed": FaultSpec(by_command, lambda site, run: site.servers.kill("mlflow"), lambda s: s.servers.up()),
    "PostgreSQL killed": FaultSpec(by_command, lambda site, run: site.servers.kill("db"), lambda s: s.servers.up()),
    "remote unplugged": FaultSpec(by_retraining, lambda site, run: site.remote.unplug(), lambda s: s.remote.plug()),
    "disk full": FaultSpec(by_command, fill, lambda site: (site.disk / BALLAST).unlink()),
}


def possible() -> list[str]:
    """Return the faults that can be injected on this machine."""
    return [name for name in FAULTS if name != "disk full" or not os.getuid()]


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Start servers, remote, disk, project and worker; stop them at the end of the block."""
    folder.chmod(0o711)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk"))
        running = stack.enter_context(servers.serving(folder / "team", ZOMBIES))
        remote = stack.enter_context(servers.remote(folder / "remote"))
        toy = toy_project.create(disk / "project", running, remote, folder)
        environment = Site(toy, disk, running, remote, folder, stack)
        query = "tags.`vitprune.prefect_flow_run_id` != '' and tags.`vitprune.project` != ''"
        (parent,) = environment.search_runs(query)
        environment.metrics = environment.metric_names(parent.data.tags["vitprune.key"])
        environment.start_worker()
        running.run("prefect", "--no-prompt", "deploy", "--all", where=toy.project)
        yield environment


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """Mount a small tmpfs, which needs root; otherwise use a plain directory."""
    path.mkdir(parents=True, exist_ok=True)
    if os.getuid():
        yield path
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
