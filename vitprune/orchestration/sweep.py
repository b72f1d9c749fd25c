"""The Prefect flow `sweep`: one task a run, each of them the flow `compress` in a place of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture, PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from vitprune.orchestration.execution.lock_and_repair import exclusive, repair
from vitprune.orchestration.execution.places import SweepWorktreeError, origin
from vitprune.orchestration.execution.processes import kill_marked, kill_tree, mark_of, run
from vitprune.orchestration.execution.run_stage import environment, reproduce
from vitprune.orchestration.summary import evaluation
from vitprune.orchestration.tracking.journal import SWEEP
from vitprune.orchestration.tracking.sweep_run import record

COMMON = ("dataset", "dense", "calibrate")  # what no method and no target changes
FINISHED, FAILED = "finished", "failed"


@dataclass(frozen=True)
class Result:
    """How one run went; error is one line, empty if it succeeded."""

    name: str
    status: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Job:
    """One run of a sweep: where it lives, and what its process gets to know."""

    name: str
    folder: Path  # the sweep's
    place: Path
    env: dict[str, str]
    stage_limit: float | None

    def write(self, result: Result) -> Result:
        """Keep how it went, whole or not at all."""
        path = self.folder / "results" / f"{self.name}.json"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
        os.replace(partial, path)
        return result

    def known(self) -> Result | None:
        """How it went, if it has finished and DVC finds nothing in its place that would have to run again."""
        path = self.folder / "results" / f"{self.name}.json"
        if not path.is_file():
            return None
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        if result.status != FINISHED:
            return None
        command = [sys.executable, "-m", "dvc", "status", "--quiet"]
        done = subprocess.run(command, cwd=self.place, env=environment(self.place), capture_output=True, check=False)
        return result if done.returncode == 0 else None


@task(cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def run_one(job: Job) -> Result:
    """Bring one run up to date by the flow `compress`, in a process of its own whose output goes to a file."""
    log = get_run_logger()
    if known := job.known():
        log.info("was finished already")
        return known
    started = time.time()
    job.write(Result(job.name, "running", 0.0))
    path = job.folder / "logs" / f"{job.name}.log"
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "vitprune.orchestration.cli_compress", "--project", str(job.place)]
    command += [] if job.stage_limit is None else ["--stage-limit", f"{job.stage_limit:g}"]
    errors: list[str] = []
    with path.open("w", encoding="utf-8") as file:

        def line(text: str) -> None:
            file.write(f"{text}\n")
            file.flush()
            if text.startswith("Error: "):
                errors.append(text.removeprefix("Error: "))

        log.info("begins")
        ended = run(command, job.place, environment(job.place) | job.env, None, line)
    seconds = time.time() - started
    if ended.exit_code == 0:
        log.info("%s (%.0f s)", _said(job.place), seconds)
        return job.write(Result(job.name, FINISHED, seconds))
    error = errors[-1] if errors else f"ended with exit code {ended.exit_code}; see {path}"
    log.warning("failed: %s", error)
    return job.write(Result(job.name, FAILED, seconds, error))


@task(task_run_name="shared", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def prepare(place: Path, stage_limit: float | None) -> str:
    """Compute once what all runs share, in the place of the first; the others take it from DVC's cache.

    Returns what went wrong in one line, empty if nothing did.
    """
    log = get_run_logger()
    with exclusive(place):
        repair(place, log.warning)
        for stage in COMMON:
            result = reproduce(stage, place, stage_limit, log.info)
            if result.exit_code:
                return result.error
            log.info("%s: %s", stage, "cached" if result.cached else f"{result.seconds:.0f} s")
    return ""


@flow(name="sweep", persist_result=False, retries=0, log_prints=False)
def sweep(project: Path, folder: Path, out: Path, stage_limit: float | None = None) -> State[list[Result]]:
    """Bring all runs of a sweep up to date, as many at once as the task runner allows, and tabulate what they found.

    `folder` has its plan, sweep.json; one run's failure does not stop the others.
    """
    log = get_run_logger()
    try:
        jobs = _jobs(project, folder, stage_limit)
    except SweepWorktreeError as error:
        return Failed(message=str(error), data=[])
    record(project, folder, out, log.warning)
    results: list[Result] = []
    futures: list[PrefectFuture[Result]] = []
    try:
        wrong = "" if all(job.known() for job in jobs) else prepare(jobs[0].place, stage_limit)
        if wrong:
            return Failed(message=wrong, data=[])
        named = [run_one.with_options(name=job.name, task_run_name=job.name) for job in jobs]
        futures += [one.submit(job) for one, job in zip(named, jobs, strict=True)]
        wait(futures)
        results = [future.result() for future in futures]
    finally:
        for future in futures:  # an interrupted sweep begins nothing more
            if isinstance(future, PrefectConcurrentFuture):
                future.wrapped_future.cancel()
        _end({str(job.place) for job in jobs})
        _tabulate(folder, out, log.warning)
        record(project, folder, out, log.warning, ended=FINISHED if results else "killed")
    failed = [result for result in results if result.status != FINISHED]
    if failed:
        names = "; ".join(f"{result.name} ({result.error})" for result in failed)
        return Failed(message=f"{len(failed)} of {len(results)} runs failed: {names}", data=results)
    return Completed(message=f"{len(results)} runs", data=results)


def _jobs(project: Path, folder: Path, stage_limit: float | None) -> list[Job]:
    """Make the places of all runs, and end what a killed sweep has left at work in them."""
    plan = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    made_from = origin(project)
    server = str(get_client(sync_client=True).api_url).rstrip("/")
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project / 'mlflow.db'}"
    jobs = []
    for one in plan["runs"]:
        place = made_from.place(folder / "runs" / one["name"], one["params"])
        kill_marked(place)
        known = json.dumps({"key": plan["key"], "name": folder.name, "run": one["name"]})
        env = {SWEEP: known, "MLFLOW_TRACKING_URI": tracking, "PREFECT_API_URL": server}
        jobs.append(Job(one["name"], folder, place, env, stage_limit))
    return jobs


def _end(places: set[str]) -> None:
    """End the runs that are still at work when the sweep is not."""
    for process in psutil.Process().children(recursive=True):
        if mark_of(process) in places:
            kill_tree(process.pid)


def _tabulate(folder: Path, out: Path, warn: Callable[..., None]) -> None:
    """Write the table and the picture, in a process of its own, and show the table in Prefect."""
    command = [sys.executable, "-P", "-m", "vitprune.cli", "sweep-table", str(folder), str(out)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        warn("the table was not written: %s", (done.stderr.strip().splitlines() or ["?"])[-1])
        return
    try:
        create_markdown_artifact((out / "sweep.md").read_text(encoding="utf-8"), key="sweep")
    except Exception as error:  # whatever a server or the way to it may raise: the runs' work is done
        warn("the table was not published: %s", (str(error).splitlines() or [type(error).__name__])[0])


def _said(place: Path) -> str:
    """What a run found, in a few words."""
    found = evaluation(place)
    if found is None:
        return "finished"
    faster = found["pruned"]["throughput"] / found["dense"]["throughput"] if "throughput" in found["pruned"] else 1.0
    return f"top-1 {found['pruned']['top1']:.2f} % (dense {found['dense']['top1']:.2f} %), {faster:.2f}x as fast"
