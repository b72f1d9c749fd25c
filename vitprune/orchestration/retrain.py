"""What the flow `retrain` calls: retrain on the newest data, compare with the champion, promote or hold back."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from vitprune.errors import BadInput
from vitprune.orchestration.compress import Outcome
from vitprune.orchestration.execution import worktrees
from vitprune.orchestration.execution.isolated import IsolatedCallError, call
from vitprune.orchestration.execution.lock_and_repair import STATE, exclusive
from vitprune.orchestration.execution.worktrees import WorktreeError
from vitprune.orchestration.tracking.kept_files import adopt, archived
from vitprune.orchestration.tracking.registry import PASSED, VERSION_OF_DATA, Registry, registry
from vitprune.orchestration.tracking.registry_copy import keep_copy, lost_versions, refuse_lost
from vitprune.orchestration.tracking.replay import replay_all
from vitprune.orchestration.tracking.store import mlflow_session, tracking_uri

Compress = Callable[[Path], State[Any]]


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining.

    Attributes:
        message: One line.
        version: Version of the model in MLflow's registry; empty if there is none.
        run_id: The MLflow run; empty if there is none.
        exit_code: Exit code of the command.
    """

    message: str
    version: str = ""
    run_id: str = ""
    exit_code: int = 0


class RetrainingError(Exception):
    """A step of a retraining failed; one line."""


@dataclass(frozen=True)
class _Retraining:
    project: Path
    models: Registry
    branch: str
    compress: Compress
    flow_run_id: str

    def run(self) -> Retrained:
        """Retrain, unless this version of the data was used before; keep the worktree unless the model is promoted."""
        base = worktrees.newest_commit(self.project)
        worktree = worktrees.add(self.project, self.flow_run_id, base)
        try:
            worktrees.update_data(worktree)
            data_version = worktrees.data_version(worktree)
            earlier = self.models.version_of_data(data_version)
        except WorktreeError:
            worktrees.remove(self.project, worktree)
            raise
        if earlier:
            worktrees.remove(self.project, worktree)
            result = "promoted" if earlier.tags.get(PASSED) == "true" else "held back"
            message = f"nothing to do: version {earlier.version} was made of this data and {result}"
            return Retrained(message, str(earlier.version))
        get_run_logger().info("data version %s, commit %s, in %s", data_version[:12], base[:12], worktree)
        challenger = self._challenger(worktree, data_version, base)
        return self._promote(challenger) if challenger.comparison["passed"] else self._hold(challenger)

    def _challenger(self, worktree: Path, data_version: str, base: str) -> "_Challenger":
        outcome = self._run_pipeline(worktree)
        champion = self.models.champion()
        comparison = self._compare(worktree, champion)
        against = "the dense model" if champion is None else f"version {champion.version}"
        _publish(comparison, against)
        tags = {VERSION_OF_DATA: data_version, PASSED: str(comparison["passed"]).lower()}
        tags |= {"vitprune.base_commit": base, "vitprune.p_worse": f"{comparison['p_worse']:.6g}"}
        tags |= {"vitprune.difference": f"{comparison['difference']:.4f}", "vitprune.compared_with": against}
        return _Challenger(worktree, outcome.upload.run_id, tags, comparison, against)

    def _run_pipeline(self, worktree: Path) -> Outcome:
        state = self.compress(worktree)
        outcome: object = state.result(raise_on_failure=False)
        if not isinstance(outcome, Outcome):
            raise RetrainingError(f"compress: {state.message}")
        if outcome.error:
            raise RetrainingError(f"{outcome.error}; the worktree {worktree} is kept")
        if outcome.upload.missed:
            raise RetrainingError(f"MLflow was not reached ({outcome.upload.error}); the worktree {worktree} is kept")
        return outcome

    def _compare(self, worktree: Path, champion: ModelVersion | None) -> dict[str, Any]:
        weights = None if champion is None else str(self.models.download(champion, worktree / STATE / "champion"))
        try:
            function = "vitprune.orchestration.torch_calls:compare_models"
            comparison: dict[str, Any] = call(function, str(worktree), weights, project=worktree)
        except IsolatedCallError as error:
            raise RetrainingError(f"comparison failed: {error}; the worktree {worktree} is kept") from None
        return comparison

    def _hold(self, challenger: "_Challenger") -> Retrained:
        tags = {**challenger.tags, "vitprune.kept_in": str(challenger.worktree)}
        version = self.models.add(challenger.run, challenger.flow_run_id, tags)
        self._keep_copy()
        failed = [gate for gate in challenger.comparison["gates"] if not gate["holds"]]
        reasons = "; ".join(f"{gate['name']} is {gate['measured']}, required is {gate['asked']}" for gate in failed)
        message = f"version {version.version} is held back: {reasons}; the worktree {challenger.worktree} is kept"
        return Retrained(message, str(version.version), challenger.run)

    def _promote(self, challenger: "_Challenger") -> Retrained:
        """Push, commit, register and move the alias last, so that everything the champion refers to exists."""
        worktree = challenger.worktree
        pushed = worktrees.push(worktree)
        subject = f"retrain: data version {challenger.tags[VERSION_OF_DATA][:12]}"
        commit = worktrees.commit_worktree(self.project, worktree, self.branch, subject, self._provenance(challenger))
        tags = {**challenger.tags, "vitprune.commit": commit}
        version = self.models.add(challenger.run, challenger.flow_run_id, tags)
        self.models.promote(version)
        self._keep_copy()
        adopt(worktree, self.project)
        worktrees.remove(self.project, worktree)
        where = "pushed to the DVC remote" if pushed else "not pushed, as the project has no DVC remote"
        points = f"{challenger.comparison['difference']:+.2f} points against {challenger.against}"
        result = f"version {version.version} is champion now ({points})"
        message = f"{result}, commit {commit[:12]} on {self.branch}, outputs {where}"
        return Retrained(message, str(version.version), challenger.run)

    def _keep_copy(self) -> None:
        with contextlib.suppress(MlflowException):  # `vitprune sync` and the next run write the copy
            keep_copy(self.project, self.models)

    def _provenance(self, challenger: "_Challenger") -> dict[str, Any]:
        comparison, data = challenger.comparison, worktrees.tracked_data(challenger.worktree)
        difference = f"{comparison['difference']:+.2f} points of {comparison['images']} images"
        return {f"Data {path}": md5 for path, md5 in data.items()} | {
            "Data-Version": challenger.tags[VERSION_OF_DATA],
            "Base-Commit": challenger.tags["vitprune.base_commit"],
            "MLflow-Run": challenger.run,
            "Prefect-Flow-Run": self.flow_run_id,
            "Model-SHA256": comparison["challenger_sha256"],
            "Compared-With": challenger.against,
            "Difference": f"{difference}, p = {comparison['p_worse']:.3g}",
        }


@dataclass(frozen=True)
class _Challenger:
    worktree: Path
    run: str
    tags: Mapping[str, str]
    comparison: Mapping[str, Any]
    against: str

    @property
    def flow_run_id(self) -> str:
        """Id of the run of the flow compress: the name of its run log."""
        return archived(self.worktree)[-1].flow_run_id


def execute_retraining(project: Path, model: str | None, branch: str, compress: Compress) -> State[Retrained]:
    """Retrain on the newest data and promote the model if it passes all gates.

    Args:
        project: The project's directory.
        model: Name in MLflow's registry; None: VITPRUNE_MODEL_NAME or the name of the project's folder.
        branch: git branch for the commits of promoted runs.
        compress: Runs the flow compress in a worktree and returns its final state.

    Returns:
        A completed or failed state whose data is the result.
    """
    project = project.resolve()
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(project))  # the worktree's runs go to the project's store
    try:
        with exclusive(project, "retrain.lock", "retraining"), mlflow_session(project):
            models = registry(project, model)
            if lost := lost_versions(project, models):
                get_run_logger().warning("MLflow has lost %d versions of %s: uploading again", len(lost), models.name)
                replay_all(project)
                refuse_lost(project, models)
            result = _Retraining(project, models, branch, compress, str(flow_run.id)).run()
    except (WorktreeError, BadInput, RetrainingError) as error:
        result = Retrained(str(error), exit_code=1)
    get_run_logger().info(result.message)
    if result.exit_code:
        return Failed(message=result.message, data=result)
    return Completed(message=result.message, data=result)


def _publish(comparison: Mapping[str, Any], against: str) -> None:
    lines = [f"# Challenger against {against}", "", "| gate | required | measured | passed |", "|---|---|---|---|"]
    lines += [
        f"| {gate['name']} | {gate['asked']} | {gate['measured']} | {'yes' if gate['holds'] else 'NO'} |"
        for gate in comparison["gates"]
    ]
    lines.append(f"\nOf {comparison['images']} images it lost {comparison['lost']} and won {comparison['won']}.")
    with contextlib.suppress(Exception):  # the artifact is optional: a Prefect server that rejects it is no failure
        create_markdown_artifact("\n".join(lines), key="gates", description="Promotion gates of the challenger")
