"""The Prefect flow `compress`: ten tasks, each one stage under DVC."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from vitprune.orchestration.execution.lock_and_repair import Busy, exclusive, keep_lockfile, repair
from vitprune.orchestration.execution.run_stage import STAGES, Fault, StageResult, check_params, environment, reproduce
from vitprune.orchestration.prefect_artifacts import publish
from vitprune.orchestration.tracking.journal import RunLog
from vitprune.orchestration.tracking.replay import UploadResult


@dataclass(frozen=True)
class Outcome:
    """How a flow run went; error is one line, empty if it succeeded; exit_code is that of the command."""

    results: tuple[StageResult, ...] = ()
    error: str = ""
    exit_code: int = 0
    mirrored: UploadResult = field(default_factory=lambda: UploadResult(0, 0))


class InfrastructureFault(Exception):
    """A stage failed by a fault that may go away: a lock, a network, a killed worker."""


def _is_infrastructure(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), InfrastructureFault)


@task(
    cache_policy=NO_CACHE,  # DVC's cache is the only one
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_is_infrastructure,
    log_prints=False,
)
def run_stage(stage: str, project: Path, stage_limit: float | None) -> StageResult | State[StageResult]:
    """Bring one stage up to date.

    Raises:
        InfrastructureFault: it is worth another attempt.
    """
    log = get_run_logger()
    result = reproduce(stage, project, stage_limit, log.info)
    if result.fault is Fault.INFRASTRUCTURE:
        log.warning("%s (a fault of the infrastructure)", result.error)
        raise InfrastructureFault(result.error)
    if result.fault is not Fault.NONE:
        return Failed(message=result.error, data=result)
    return result


@flow(name="compress", persist_result=False, retries=0, log_prints=False)
def compress(project: Path = Path("."), stage_limit: float | None = None) -> State[Outcome]:
    """Bring all ten stages of a project up to date and record the run; `stage_limit` is in seconds, for each stage."""
    project = project.resolve()
    log = get_run_logger()
    try:
        with exclusive(project):
            repair(project, log.warning)
            outcome = _carry_out(project, stage_limit, log.warning)
    except Busy as error:
        outcome = Outcome(error=str(error), exit_code=2)
    except OSError as error:  # a full disk, say: the run cannot be written down
        why = error.strerror or str(error)
        outcome = Outcome(error=f"{error.filename or project}: {why}; mend it and start again", exit_code=1)
    if outcome.error:
        return Failed(message=outcome.error, data=outcome)
    return Completed(message=summary_line(outcome.results), data=outcome)


def summary_line(results: Sequence[StageResult]) -> str:
    """Say in one line what was computed."""
    cached = sum(result.cached for result in results)
    if cached == len(results):
        return f"nothing to compute: all {cached} stages were cached"
    return f"{len(results) - cached} stages ran, {cached} cached"


def _carry_out(project: Path, stage_limit: float | None, warn: Callable[[str], None]) -> Outcome:
    if error := check_params(project):
        return Outcome(error=error, exit_code=2)
    journal = RunLog(project, str(flow_run.id))
    journal.start(time.time())
    results: list[StageResult] = []
    status = "KILLED"
    try:
        for stage in STAGES:
            results.append(_result(stage, project, stage_limit))
            journal.stage(results[-1])
            keep_lockfile(project)
            if results[-1].exit_code:
                break
        status = "FAILED" if results[-1].exit_code else "FINISHED"
    finally:
        journal.end(status, results[-1].error if results else "", time.time())
    mirrored = upload_runs(project, journal.flow_run_id)
    publish(project, mirrored, [result.as_dict() for result in results], warn)
    last = results[-1]
    code = 0 if status == "FINISHED" else 2 if last.fault is Fault.INPUT else 1
    return Outcome(tuple(results), last.error, code, mirrored)


def _result(stage: str, project: Path, stage_limit: float | None) -> StageResult:
    started = time.time()
    named = run_stage.with_options(name=stage, task_run_name=stage)
    state = named(stage, project, stage_limit, return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, StageResult):
        return result
    error = str(result) if isinstance(result, InfrastructureFault) else f"{stage}: {state.message}"
    return StageResult(stage, False, started, time.time() - started, 1, Fault.INFRASTRUCTURE, error)


def upload_runs(project: Path, flow_run_id: str) -> UploadResult:
    """Mirror the journals to MLflow in a process of its own, whose failure costs the run nothing."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "vitprune.orchestration.tracking.replay", "replay", "--json"]
    command += ["--project", str(project), "--flow-run", flow_run_id]
    done = subprocess.run(
        command, env=environment(project), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    try:
        return UploadResult(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return UploadResult(0, 1, error=last)
