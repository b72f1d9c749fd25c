"""`vitprune retrain`, `vitprune versions` and `vitprune rollback`."""

import sys
from pathlib import Path

from vitprune.orchestration.cli_compress import check_stage_limit, checked_project
from vitprune.orchestration.interrupts import run_interruptibly
from vitprune.orchestration.prefect_setup import prepared_flow

STOPPED = "stopped; run again to retrain from the start (finished stages come from DVC's cache)"


def run_retraining(project: Path, model: str | None, branch: str, stage_limit: float | None) -> int:
    """Run the flow retrain of a project.

    Args:
        project: The project's directory.
        model: Name in MLflow's registry; None: VITPRUNE_MODEL_NAME or the name of the project's folder.
        branch: git branch for the commits of promoted runs.
        stage_limit: Seconds after which a stage is killed; None: no limit.

    Returns:
        Exit code: 0 success, 1 failure, 130 interrupted.

    Raises:
        BadInput: this is no project, or the stage limit is not positive.
    """
    check_stage_limit(stage_limit)
    project = checked_project(project)
    return run_interruptibly(lambda interrupted: _run(project, model, branch, stage_limit), STOPPED)


def _run(project: Path, model: str | None, branch: str, stage_limit: float | None) -> int:
    retrain, _ = prepared_flow(project, "retrain")
    from vitprune.orchestration.retrain import Retrained  # imports Prefect, which reads its settings then

    state = retrain(project, model, branch, stage_limit, return_state=True)
    result: object = state.result(raise_on_failure=False)
    if not isinstance(result, Retrained):
        print(f"Error: {(state.message or str(result)).splitlines()[0]}", file=sys.stderr)
        return 1
    print(result.message, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code


def roll_back(project: Path, model: str | None) -> None:
    """Set the alias champion back to the former champion, and print both versions.

    Raises:
        BadInput: there is no champion, or no former one, or MLflow has lost the versions.
    """
    from vitprune.orchestration.tracking.registry import registry
    from vitprune.orchestration.tracking.registry_copy import keep_copy, refuse_lost
    from vitprune.orchestration.tracking.store import mlflow_session

    project = checked_project(project)
    with mlflow_session(project):
        models = registry(project, model)
        refuse_lost(project, models)
        old, new = models.roll_back()
        keep_copy(project, models)
    print(f"{models.name}: version {new} is champion again, in place of version {old}")


def print_versions(project: Path, model: str | None) -> None:
    """Print every version with its result and its MLflow run, and mark the champion.

    Raises:
        BadInput: MLflow has lost the versions.
    """
    from vitprune.orchestration.tracking.registry import PASSED, registry
    from vitprune.orchestration.tracking.registry_copy import refuse_lost
    from vitprune.orchestration.tracking.store import mlflow_session

    project = checked_project(project)
    with mlflow_session(project):
        models = registry(project, model)
        refuse_lost(project, models)
        champion = models.champion()
        versions = models.versions()
        if not versions:
            print(f"{models.name}: no version yet; `vitprune retrain` makes the first one")
        for version in versions:
            mark = "champion" if champion is not None and version.version == champion.version else ""
            result = "passed" if version.tags.get(PASSED) == "true" else "held back"
            difference = version.tags.get("vitprune.difference", "?")
            print(
                f"{models.name} {version.version}: {result}, {difference} points, run {version.run_id} {mark}".rstrip()
            )
