"""What the flow `compress` calls: run all stages of a project, keep the run log, upload it to MLflow."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from vitprune.config.params import load_params
from vitprune.errors import BadInput
from vitprune.orchestration.execution.isolated import IsolatedCallError, call
from vitprune.orchestration.execution.lock_and_repair import Busy, exclusive, keep_lockfile, repair
from vitprune.orchestration.execution.run_stage import STAGES, FailureClass, StageResult, reproduce
from vitprune.orchestration.prefect_artifacts import publish
from vitprune.orchestration.tracking.journal import RunLog
from vitprune.orchestration.tracking.live_curves import follow
from vitprune.orchestration.tracking.replay import UploadResult

RunLogger = Logger | LoggerAdapter[Logger]
RunStage = Callable[[str, Path], State[Any]]


@dataclass(frozen=True)
class Outcome:
    """Result of a flow run.

    Attributes:
        results: One result per stage that was started.
        error: One line; empty on success.
        exit_code: Exit code of the command.
        upload: What was uploaded to MLflow.
    """

    results: tuple[StageResult, ...] = ()
    error: str = ""
    exit_code: int = 0
    upload: UploadResult = field(default_factory=lambda: UploadResult(0, 0))


class InfrastructureError(Exception):
    """A stage failed for a reason that a retry may cure: a lock, a network, a killed worker."""


def is_infrastructure_error(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a task run failed by an InfrastructureError: the retry condition of the stages' task."""
    return isinstance(state.result(raise_on_failure=False), InfrastructureError)


def execute_stage(
    stage: str, project: Path, stage_limit: float | None, log: RunLogger
) -> StageResult | State[StageResult]:
    """Run one stage under DVC.

    Args:
        stage: Name of the stage.
        project: The project's directory.
        stage_limit: Seconds after which the stage is killed; None: no limit.
        log: Logger of the task run.

    Returns:
        The result, or a failed state with the result.

    Raises:
        InfrastructureError: a retry may cure the failure.
    """
    result = reproduce(stage, project, stage_limit, log.info)
    if result.failure is FailureClass.INFRASTRUCTURE:
        log.warning("%s (infrastructure failure)", result.error)
        raise InfrastructureError(result.error)
    if result.failure is not FailureClass.NONE:
        return Failed(message=result.error, data=result)
    return result


def execute_pipeline(project: Path, run_stage: RunStage) -> State[Outcome]:
    """Run all stages of a project while holding its lock, keep the run log and upload it.

    Args:
        project: The project's directory.
        run_stage: Starts the task of a stage in a project and returns its final state.

    Returns:
        A completed or failed state whose data is the outcome.
    """
    project = project.resolve()
    log = get_run_logger()
    try:
        with exclusive(project):
            repair(project, log.warning)
            outcome = _run_all(project, run_stage, log.warning)
    except Busy as error:
        outcome = Outcome(error=str(error), exit_code=2)
    except OSError as error:  # such as a full disk: the run log cannot be written
        reason = error.strerror or str(error)
        outcome = Outcome(error=f"{error.filename or project}: {reason}; correct it and run again", exit_code=1)
    if outcome.error:
        return Failed(message=outcome.error, data=outcome)
    return Completed(message=summary_line(outcome.results), data=outcome)


def summary_line(results: Sequence[StageResult]) -> str:
    """Return the numbers of stages that ran and that were cached, in one line."""
    cached = sum(result.cached for result in results)
    if cached == len(results):
        return f"nothing to compute: all {cached} stages were cached"
    return f"{len(results) - cached} stages ran, {cached} cached"


def _run_all(project: Path, run_stage: RunStage, warn: Callable[[str], None]) -> Outcome:
    run_log = RunLog(project, str(flow_run.id))
    try:
        load_params(project / "params.yaml")  # DVC, which reads only the keys of its stages, ignores a misspelled one
        run_log.start(time.time())
    except BadInput as error:
        return Outcome(error=str(error), exit_code=2)
    results: list[StageResult] = []
    status = "KILLED"
    try:
        for stage in STAGES:
            with follow(project, run_log.flow_run_id, stage) as times:
                result = _result(stage, project, run_stage)
            results.append(result if result.cached else replace(result, epochs=tuple(times)))
            run_log.stage(results[-1])
            keep_lockfile(project)
            if results[-1].exit_code:
                break
        status = "FAILED" if results[-1].exit_code else "FINISHED"
    finally:
        run_log.end(status, results[-1].error if results else "", time.time())
    if reason := run_log.share():
        warn(reason)
    upload = upload_run(project, run_log.flow_run_id)
    publish(project, upload, [result.as_dict() for result in results], warn)
    last = results[-1]
    code = 0 if status == "FINISHED" else 2 if last.failure is FailureClass.INPUT else 1
    return Outcome(tuple(results), last.error, code, upload)


def _result(stage: str, project: Path, run_stage: RunStage) -> StageResult:
    started = time.time()
    state = run_stage(stage, project)
    result: object = state.result(raise_on_failure=False)
    if isinstance(result, StageResult):
        return result
    error = str(result) if isinstance(result, InfrastructureError) else f"{stage}: {state.message}"
    return StageResult(stage, False, started, time.time() - started, 1, FailureClass.INFRASTRUCTURE, error)


def upload_run(project: Path, flow_run_id: str) -> UploadResult:
    """Upload the run log to MLflow, and those of earlier runs that could not be uploaded; a failure is no error."""
    try:
        function = "vitprune.orchestration.tracking.replay:replay_as_dict"
        return UploadResult(**call(function, str(project), flow_run_id, project=project))
    except IsolatedCallError as error:
        return UploadResult(0, 1, error=str(error))
