"""What the fault drill does to a run: faults, how each is brought about and mended, and the runs that they meet."""

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
    """How a run ended: its exit code (0: right), what it printed, and the line that says why it failed."""

    code: int
    said: str
    line: str

    @property
    def clear(self) -> bool:
        """Whether it ended right, or said why not in one line and without a traceback."""
        return self.code == 0 or bool(self.line and "Traceback" not in self.said)


@dataclass
class Site:
    """The toy on its disk, the servers, the remote, and the worker while it lives."""

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
        """A new file for what a run prints."""
        self.count += 1
        return self.scratch / f"{self.count:03d}-{name}.log"

    def employ(self) -> None:
        """Have a worker at work."""
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self.stack.enter_context(self.servers.worker(self.scratch / "worker.log"))

    def running(self) -> list[str]:
        """Runs that Prefect takes for running, once it has had the time to notice."""
        wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "limit": 200}
        deadline = time.monotonic() + 240
        while found := self.servers.ask("/flow_runs/filter", wanted):
            if time.monotonic() > deadline:
                break
            time.sleep(2)
        return [run["name"] for run in found]

    def client(self) -> MlflowClient:
        """MLflow's client of the server."""
        return MlflowClient(tracking_uri=self.servers.env["MLFLOW_TRACKING_URI"])

    def recorded(self, run: "Run") -> list[str]:
        """What MLflow lacks of a run that ended right, or an audit finds."""
        flow = run.flow()
        with short_timeouts(60):
            if self.toy.put()["missed"]:
                return ["MLflow could not be told afterwards"]
            found = self.names_of_metrics(flow)
            (parent,) = self.found(f"tags.`vitprune.key` = '{flow}'")
        lacks = toy_project.unlike(found, self.metrics)
        return [f"{stage}: metrics in MLflow are not complete" for stage in lacks] + self.toy.audit(parent.info.run_id)

    def names_of_metrics(self, flow: str) -> dict[str, list[str]]:
        """The names of the metrics of a flow's run and of its stages' runs, or of the runs that computed those."""
        rows = self.found(f"tags.`vitprune.prefect_flow_run_id` = '{flow}'")
        named = {row.data.tags["vitprune.key"].partition("/")[2]: sorted(self._known(row)) for row in rows}
        return {stage: names for stage, names in named.items() if stage in ("", *STAGES)}

    def _known(self, run: Any) -> set[str]:
        source = run.data.tags.get("vitprune.computed_by")
        return {*run.data.metrics, *(self.client().get_run(source).data.metrics if source else ())}

    def found(self, wanted: str) -> list[Any]:
        """Runs of MLflow."""
        client = self.client()
        experiment = client.get_experiment_by_name("vitprune")
        return list(client.search_runs([experiment.experiment_id], wanted, max_results=200))


@dataclass
class Run:
    """A run by a command of the flows."""

    toy: Toy
    process: "subprocess.Popen[bytes]"
    log: Path
    branch: str = ""
    was_killed: bool = False

    def wait(self, seconds: float) -> bool:
        """Wait for its end; False if it does not come."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def kill(self) -> None:
        """Kill the flow, and it alone: what it has started lives on."""
        self.was_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> Outcome:
        """How it ended."""
        said = self.log.read_text()
        lines = [line for line in said.splitlines() if line.strip()]
        wanted = [line for line in lines if line.startswith("Error: ")] or (lines[-1:] if self.branch else [])
        return Outcome(self.process.wait(), said, wanted[-1] if wanted else "")

    def flow(self) -> str:
        """The id of the flow run of its pipeline, by which MLflow knows it."""
        if not self.branch:
            journals = (self.toy.project / STATE / "journal").rglob("*.jsonl")
            return max(journals, key=lambda path: path.stat().st_mtime_ns).stem
        message = toy_project.told(self.toy.project, "git", "log", "-1", "--format=%B", self.branch)
        client = MlflowClient(tracking_uri=self.toy.servers.env["MLFLOW_TRACKING_URI"])
        run = client.get_run(re.findall(r"^MLflow-Run: (\w+)$", message, re.M)[0])
        return str(run.data.tags["vitprune.key"])


@dataclass
class Deployed:
    """A run of the deployment `compress`, which the worker carries out."""

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
        """Wait for its end; False if it does not come. A killed one does not end by itself."""
        deadline = time.monotonic() + seconds
        while not self.was_killed and self._state()["type"] not in ENDED:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def kill(self) -> None:
        """Nothing but its worker can be killed."""
        self.was_killed = True

    def outcome(self) -> Outcome:
        """How it ended."""
        state = self._state()
        message = str(state.get("message") or state["name"])
        return Outcome(int(state["type"] != "COMPLETED"), message, message.splitlines()[0])

    def flow(self) -> str:
        """The id of the flow run."""
        return self.id


@dataclass(frozen=True)
class Strike:
    """A fault: the runs that it meets, how it comes about, and how it is mended."""

    launcher: Callable[[Site, str], Any]
    break_it: Callable[[Site, Any], None]
    mend: Callable[[Site], None]


def by_command(site: Site, stage: str) -> Run:
    """`vitprune run`."""
    log = site.log("flow")
    return Run(site.toy, site.toy.flow(log, "run"), log)


def by_retraining(site: Site, stage: str) -> Run:
    """`vitprune retrain`, for a model of its own; what the project itself has computed is of no use to it."""
    (site.toy.project / "dvc.lock").unlink(missing_ok=True)
    log, name = site.log("retrain"), f"drill-{stage}"
    process = site.toy.flow(log, "retrain", "--model", name, "--branch", name)
    return Run(site.toy, process, log, name)


def by_worker(site: Site, stage: str) -> Deployed:
    """A run of the deployment `compress`."""
    site.employ()
    (deployment,) = site.servers.ask("/deployments/filter", {"deployments": {"name": {"any_": ["compress"]}}})
    run = site.servers.ask(f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    return Deployed(site.toy, run["id"])


def kill_worker(site: Site, run: Deployed) -> None:
    """The worker's machine goes down: it and all that it has started."""
    assert site.worker is not None
    kill_tree(site.worker.pid)
    site.worker.wait()
    run.kill()


def reset(site: Site, run: Deployed) -> None:
    """The only machine goes down: the worker and all servers at once."""
    kill_worker(site, run)
    for name in ("prefect", "mlflow", "db"):
        site.servers.kill(name)


def fill(site: Site, run: Any) -> None:
    """Fill the disk to its last byte."""
    with contextlib.suppress(OSError), (site.disk / BALLAST).open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def nothing(site: Site) -> None:
    """Nothing is to be mended."""


FAULTS: dict[str, Strike] = {
    "worker killed": Strike(by_worker, kill_worker, nothing),
    "machine reset": Strike(by_worker, reset, lambda site: site.servers.up()),
    "flow killed": Strike(by_command, lambda site, run: run.kill(), nothing),
    "Prefect killed": Strike(by_command, lambda site, run: site.servers.kill("prefect"), lambda s: s.servers.up()),
    "MLflow killed": Strike(by_command, lambda site, run: site.servers.kill("mlflow"), lambda s: s.servers.up()),
    "PostgreSQL killed": Strike(by_command, lambda site, run: site.servers.kill("db"), lambda s: s.servers.up()),
    "remote unplugged": Strike(by_retraining, lambda site, run: site.remote.unplug(), lambda s: s.remote.plug()),
    "disk full": Strike(by_command, fill, lambda site: (site.disk / BALLAST).unlink()),
}


def possible() -> list[str]:
    """The faults that can be brought about here."""
    return [name for name in FAULTS if name != "disk full" or not os.getuid()]


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Everything that the drill needs, for as long as the block lasts."""
    folder.chmod(0o711)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk"))
        running = stack.enter_context(servers.serving(folder / "team", ZOMBIES))
        remote = stack.enter_context(servers.remote(folder / "remote"))
        toy = toy_project.made(disk / "project", running, remote, folder)
        made = Site(toy, disk, running, remote, folder, stack)
        (parent,) = made.found("tags.`vitprune.prefect_flow_run_id` != '' and tags.`vitprune.project` != ''")
        made.metrics = made.names_of_metrics(parent.data.tags["vitprune.key"])
        made.employ()
        running.run("prefect", "--no-prompt", "deploy", "--all", where=toy.project)
        yield made


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A disk in memory, as only root may mount one; else a folder, which cannot be filled."""
    place.mkdir(parents=True, exist_ok=True)
    if os.getuid():
        yield place
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
