"""The Prefect flow `compress`: one task for every DVC stage of the project.

`vitprune run` and the deployment in prefect.yaml load it from here. Change it as you need, for example to add a task
that publishes the model; DVC decides which stages run, so Prefect caches nothing.
"""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger

from vitprune.orchestration.compress import Outcome, execute_pipeline, execute_stage, is_infrastructure_error
from vitprune.orchestration.execution.run_stage import StageResult


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=is_infrastructure_error,
    log_prints=False,
)
def run_stage(stage: str, project: Path, stage_limit: float | None) -> StageResult | State[StageResult]:
    """Run one stage under DVC; retried after an infrastructure failure."""
    return execute_stage(stage, project, stage_limit, get_run_logger())


@flow(name="compress", persist_result=False, retries=0, log_prints=False)
def compress(project: Path = Path("."), stage_limit: float | None = None) -> State[Outcome]:
    """Run all stages of a project that are out of date, and record the run in MLflow.

    Args:
        project: The project's directory.
        stage_limit: Seconds after which a stage is killed; null: no limit.
    """

    def run(stage: str, directory: Path) -> State[Any]:
        named = run_stage.with_options(name=stage, task_run_name=stage)
        return named(stage, directory, stage_limit, return_state=True)

    return execute_pipeline(project, run)
