"""What the flow `sweep` calls: worktrees of the runs, shared stages, runs in processes of their own, the table."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture, PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from vitprune.orchestration.compress import RunLogger
from vitprune.orchestration.execution.isolated import IsolatedCallError, call
from vitprune.orchestration.execution.lock_and_repair import exclusive, repair
from vitprune.orchestration.execution.processes import (
    dvc_in_project,
    kill_after_grace,
    kill_marked,
    mark_of,
    process_environment,
    run,
)
from vitprune.orchestration.execution.run_stage import reproduce
from vitprune.orchestration.execution.worktrees import WorktreeError, project_state
from vitprune.orchestration.tracking.journal import SWEEP
from vitprune.orchestration.tracking.sweep_run import record
from vitprune.pipeline.report.inputs import read_evaluation
from vitprune.runtime.files import read_json, read_optional_json, write_json
from vitprune.runtime.messages import first_line

SHARED_STAGES = ("dataset", "dense", "calibrate")  # independent of method and target
FINISHED, FAILED = "finished", "failed"


@dataclass(frozen=True)
class RunResult:
    """Result of one run of a sweep: `status` is running, finished or failed; `error` is one line, empty on success."""

    name: str
    status: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep.

    Attributes:
        name: Method and target.
        folder: The sweep's folder.
        directory: The run's project directory.
        env: Further environment variables of its process.
        stage_limit: Seconds after which a stage is killed; None: no limit.
    """

    name: str
    folder: Path
    directory: Path
    env: dict[str, str]
    stage_limit: float | None

    def write(self, result: RunResult) -> RunResult:
        """Write the result atomically, and return it."""
        write_json(self._result_file, asdict(result))
        return result

    def finished(self) -> RunResult | None:
        """Return the result if the run has finished and DVC would run no stage again, else None."""
        written = read_optional_json(self._result_file)
        if written is None:
            return None
        result = RunResult(**written)
        up_to_date = result.status == FINISHED and dvc_in_project(self.directory, "status", "--quiet").returncode == 0
        return result if up_to_date else None

    @property
    def _result_file(self) -> Path:
        return self.folder / "results" / f"{self.name}.json"


def execute_job(job: SweepJob, log: RunLogger) -> RunResult:
    """Run `vitprune run` in a run's directory, in a process of its own whose output is written to a file."""
    if result := job.finished():
        log.info("already finished")
        return result
    started = time.time()
    job.write(RunResult(job.name, "running", 0.0))
    path = job.folder / "logs" / f"{job.name}.log"
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "vitprune.cli", "run", "--project", str(job.directory)]
    command += [] if job.stage_limit is None else ["--stage-limit", f"{job.stage_limit:g}"]
    errors: list[str] = []
    with path.open("w", encoding="utf-8") as file:

        def line(text: str) -> None:
            file.write(f"{text}\n")
            file.flush()
            if text.startswith("Error: "):
                errors.append(text.removeprefix("Error: "))

        log.info("started")
        ended = run(command, job.directory, process_environment(job.directory) | job.env, None, line)
    seconds = time.time() - started
    if ended.exit_code == 0:
        log.info("%s (%.0f s)", _summary(job.directory), seconds)
        return job.write(RunResult(job.name, FINISHED, seconds))
    error = errors[-1] if errors else f"exit code {ended.exit_code}; see {path}"
    log.warning("failed: %s", error)
    return job.write(RunResult(job.name, FAILED, seconds, error))


def prepare_shared_stages(directory: Path, stage_limit: float | None, log: RunLogger) -> str:
    """Run the stages that all runs share in the directory of the first; the others take them from the DVC cache.

    Returns:
        An error line; empty on success.
    """
    with exclusive(directory):
        repair(directory, log.warning)
        for stage in SHARED_STAGES:
            result = reproduce(stage, directory, stage_limit, log.info)
            if result.exit_code:
                return result.error
            log.info("%s: %s", stage, "cached" if result.cached else f"{result.seconds:.0f} s")
    return ""


def execute_sweep(
    project: Path,
    folder: Path,
    out: Path,
    stage_limit: float | None,
    run_shared: Callable[[Path], str],
    submit: Callable[[SweepJob], PrefectFuture[RunResult]],
) -> State[list[RunResult]]:
    """Run all runs of a sweep, as many at once as the flow's task runner allows, and write the table.

    Args:
        project: The project's directory.
        folder: The sweep's folder, with sweep.json.
        out: Folder for the table and the Pareto plot.
        stage_limit: Seconds after which a stage is killed; None: no limit.
        run_shared: Runs the task of the shared stages in a directory; returns an error line, empty on success.
        submit: Starts the task of one run.

    Returns:
        A completed or failed state whose data are the results.
    """
    log = get_run_logger()
    try:
        jobs = _jobs(project, folder, stage_limit)
    except WorktreeError as error:
        return Failed(message=str(error), data=[])
    record(project, folder, out, log.warning)
    results: list[RunResult] = []
    futures: list[PrefectFuture[RunResult]] = []
    try:
        error_line = "" if all(job.finished() for job in jobs) else run_shared(jobs[0].directory)
        if error_line:
            return Failed(message=error_line, data=[])
        futures += [submit(job) for job in jobs]
        wait(futures)
        results = [future.result() for future in futures]
    finally:
        for future in futures:  # an interrupted sweep starts no further run
            if isinstance(future, PrefectConcurrentFuture):
                future.wrapped_future.cancel()
        _kill_runs({str(job.directory) for job in jobs})
        if results:
            _write_table(folder, out, log.warning)
        record(project, folder, out, log.warning, FINISHED if results else "killed")
    failed = [result for result in results if result.status != FINISHED]
    if failed:
        names = "; ".join(f"{result.name} ({result.error})" for result in failed)
        return Failed(message=f"{len(failed)} of {len(results)} runs failed: {names}", data=results)
    return Completed(message=f"{len(results)} runs", data=results)


def _jobs(project: Path, folder: Path, stage_limit: float | None) -> list[SweepJob]:
    """Check out the directories of all runs, and kill the processes that a killed sweep left running in them."""
    plan = read_json(folder / "sweep.json")
    state = project_state(project)
    server = str(get_client(sync_client=True).api_url).rstrip("/")
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project / 'mlflow.db'}"
    jobs = []
    for planned in plan["runs"]:
        directory = state.check_out(folder / "runs" / planned["name"], planned["params"])
        kill_marked(directory)
        sweep = json.dumps({"key": plan["key"], "name": folder.name, "run": planned["name"]})
        env = {SWEEP: sweep, "MLFLOW_TRACKING_URI": tracking, "PREFECT_API_URL": server}
        jobs.append(SweepJob(planned["name"], folder, directory, env, stage_limit))
    return jobs


def _kill_runs(directories: set[str]) -> None:
    """End the runs that are still active when the sweep ends, each as Ctrl-C does; kill them after GRACE."""
    runs = [process for process in psutil.Process().children() if mark_of(process) in directories]
    for process in runs:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    kill_after_grace(runs)


def _write_table(folder: Path, out: Path, warn: Callable[..., None]) -> None:
    """Write the table and the plot, and publish the table in Prefect; a failure is a warning."""
    try:
        call("vitprune.orchestration.torch_calls:write_sweep_table", str(folder), str(out), project=folder)
    except IsolatedCallError as error:
        warn("the table was not written: %s", error)
        return
    try:
        create_markdown_artifact((out / "sweep.md").read_text(encoding="utf-8"), key="sweep")
    except Exception as error:  # the artifact is optional: a Prefect server that rejects it is no failure
        warn("the table was not published: %s", first_line(error))


def _summary(directory: Path) -> str:
    """Return accuracy and speed-up of a finished run in a few words."""
    result = read_evaluation(directory / "metrics")
    if result is None:
        return "finished"
    dense, pruned = result["dense"], result["pruned"]
    speedup = pruned["throughput"] / dense["throughput"] if "throughput" in pruned else 1.0
    return f"top-1 {pruned['top1']:.2f} % (dense {dense['top1']:.2f} %), speed-up {speedup:.2f}x"
