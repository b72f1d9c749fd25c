"""The Prefect flow `sweep`: one task for every run of a sweep, each of which is the flow `compress` in a worktree.

`vitprune sweep` loads it from here.
"""

from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from vitprune.orchestration.sweep import RunResult, SweepJob, execute_job, execute_sweep, prepare_shared_stages


@task(task_run_name="shared", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def prepare(directory: Path, stage_limit: float | None) -> str:
    """Run the stages that all runs share; return an error line, empty on success."""
    return prepare_shared_stages(directory, stage_limit, get_run_logger())


@task(cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def run_job(job: SweepJob) -> RunResult:
    """Run one method at one target in a process of its own."""
    return execute_job(job, get_run_logger())


@flow(name="sweep", persist_result=False, retries=0, log_prints=False)
def sweep(project: Path, folder: Path, out: Path, stage_limit: float | None = None) -> State[list[RunResult]]:
    """Run all runs of a sweep that are out of date; the failure of a run does not stop the others.

    Args:
        project: The project's directory.
        folder: The sweep's folder, with its plan in sweep.json.
        out: Folder for the table and the Pareto plot.
        stage_limit: Seconds after which a stage is killed; null: no limit.
    """

    def submit(job: SweepJob) -> PrefectFuture[RunResult]:
        return run_job.with_options(name=job.name, task_run_name=job.name).submit(job)

    def run_shared(directory: Path) -> str:
        return prepare(directory, stage_limit)

    return execute_sweep(project, folder, out, stage_limit, run_shared, submit)
