"""The Prefect flow `retrain`: run the pipeline on the newest data, compare with the champion, promote or reject.

`vitprune retrain` and the deployment in prefect.yaml load it from here.
"""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from vitprune.orchestration.prefect_setup import load_flow
from vitprune.orchestration.retrain import Retrained, execute_retraining


@flow(name="retrain", persist_result=False, retries=0, log_prints=False)
def retrain(
    project: Path = Path("."), model: str | None = None, branch: str = "retrain", stage_limit: float | None = None
) -> State[Retrained]:
    """Retrain on the newest data in a git worktree; the model becomes champion if it passes all gates of gates.yaml.

    Args:
        project: The project's directory.
        model: Name in MLflow's registry; null: the name of the project's folder.
        branch: git branch for the commits of promoted runs.
        stage_limit: Seconds after which a stage is killed; null: no limit.
    """

    def compress(worktree: Path) -> State[Any]:
        state: State[Any] = load_flow(worktree, "compress")(worktree, stage_limit, return_state=True)
        return state

    return execute_retraining(project, model, branch, compress)
