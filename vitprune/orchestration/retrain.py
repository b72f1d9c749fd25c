"""The Prefect flow `retrain`: newest data, a run in a worktree of its own, champion against challenger, promotion."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from vitprune.orchestration.compress import Outcome, compress
from vitprune.orchestration.execution import worktrees
from vitprune.orchestration.execution.lock_and_repair import STATE, Busy, exclusive
from vitprune.orchestration.execution.run_stage import environment
from vitprune.orchestration.execution.worktrees import GitFault
from vitprune.orchestration.tracking.replay import MIRRORED
from vitprune.orchestration.tracking.store import short_patience, tracking_uri

if TYPE_CHECKING:
    from vitprune.orchestration.tracking.registry import Registry

COMPARISON = ".vitprune/comparison.json"


@dataclass(frozen=True)
class Retrained:
    """How a retraining went: `did` is nothing, promoted or held; `exit_code` is that of the command."""

    did: str
    message: str
    version: str = ""
    run_id: str = ""
    exit_code: int = 0


@flow(name="retrain", persist_result=False, retries=0, log_prints=False)
def retrain(
    project: Path = Path("."), model: str | None = None, branch: str = "retrain", stage_limit: float | None = None
) -> State[Retrained]:
    """Train and prune on the newest data, and let the result take the champion's place if all gates hold.

    `model` is the name in MLflow's registry (null: the project's folder), `branch` takes the commits of promoted runs,
    `stage_limit` is in seconds, for each stage.
    """
    project = project.resolve()
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(project))  # the worktree's runs belong to the project
    try:
        with exclusive(project, "retrain.lock", "retraining"), short_patience(60):
            result = _Retraining(project, model, branch, stage_limit, str(flow_run.id)).carry_out()
    except (GitFault, Busy, _Fault) as error:
        result = Retrained("failed", str(error), exit_code=1)
    get_run_logger().info(result.message)
    if result.exit_code:
        return Failed(message=result.message, data=result)
    return Completed(message=result.message, data=result)


class _Fault(Exception):
    """A step of a retraining failed; one line."""


@dataclass(frozen=True)
class _Retraining:
    project: Path
    model: str | None
    branch: str
    stage_limit: float | None
    flow_run_id: str

    def carry_out(self) -> Retrained:
        """Retrain, unless this version of the data has been tried; a worktree stays unless its model is promoted."""
        from vitprune.orchestration.tracking.registry import registry

        models = registry(self.project, self.model)
        base = worktrees.newest(self.project)
        place = worktrees.add(self.project, self.flow_run_id, base)
        try:
            worktrees.take_newest_data(place)
            version_of_data = worktrees.data_version(place)
            tried = models.tried(version_of_data)
        except GitFault:
            worktrees.remove(self.project, place)
            raise
        if tried:
            worktrees.remove(self.project, place)
            how = "promoted" if tried.tags.get("vitprune.passed") == "true" else "held back"
            message = f"nothing to do: version {tried.version} was made of this data and {how}"
            return Retrained("nothing", message, str(tried.version))
        get_run_logger().info("data version %s, commit %s, in %s", version_of_data[:12], base[:12], place)
        outcome = self._compress(place)
        champion = models.champion()
        facts = _judged(place, None if champion is None else models.weights_of(champion, place / STATE / "champion"))
        against = "the dense model" if champion is None else f"version {champion.version}"
        _publish(facts, against)
        tags = {"vitprune.data_version": version_of_data, "vitprune.passed": str(facts["passed"]).lower()}
        tags |= {"vitprune.base_commit": base, "vitprune.p_worse": f"{facts['p_worse']:.6g}"}
        tags |= {"vitprune.difference": f"{facts['difference']:.4f}", "vitprune.compared_with": against}
        challenger = _Challenger(models, place, outcome.mirrored.run_id, tags, facts, against)
        return self._promoted(challenger) if facts["passed"] else self._held(challenger)

    def _held(self, own: "_Challenger") -> Retrained:
        """Keep everything for inspection, and the champion."""
        version = own.models.add(own.run, _flow_of(own.place), {**own.tags, "vitprune.kept_in": str(own.place)})
        message = f"version {version.version} is held back: {_failed(own.facts)}; everything is kept in {own.place}"
        return Retrained("held", message, str(version.version), own.run)

    def _promoted(self, own: "_Challenger") -> Retrained:
        """Push, commit, register and, last of all, move the alias: what a champion names is always there."""
        pushed = worktrees.push(own.place)
        facts = worktrees.provenance(self._provenance(own))
        message = f"Retrain on data {own.tags['vitprune.data_version'][:12]}.\n\n{facts}"
        commit = worktrees.commit(self.project, own.place, self.branch, message)
        version = own.models.add(own.run, _flow_of(own.place), {**own.tags, "vitprune.commit": commit})
        own.models.promote(version)
        worktrees.remove(self.project, own.place)
        where = "pushed to the DVC remote" if pushed else "not pushed, as no DVC remote is set"
        message = f"version {version.version} is champion now ({own.facts['difference']:+.2f} points against "
        message += f"{own.against}), commit {commit[:12]} on {self.branch}, outputs {where}"
        return Retrained("promoted", message, str(version.version), own.run)

    def _compress(self, place: Path) -> Outcome:
        """Run the pipeline as a flow within this one."""
        state = compress(place, self.stage_limit, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if not isinstance(outcome, Outcome):
            raise _Fault(f"compress: {state.message}")
        if outcome.error:
            raise _Fault(f"{outcome.error}; everything is kept in {place}")
        if outcome.mirrored.missed:
            raise _Fault(f"MLflow was not reached ({outcome.mirrored.error}); everything is kept in {place}")
        return outcome

    def _provenance(self, own: "_Challenger") -> dict[str, Any]:
        facts, inputs = own.facts, worktrees.inputs(own.place)
        difference = f"{facts['difference']:+.2f} points of {facts['images']} images, p = {facts['p_worse']:.3g}"
        return {f"Data {path}": md5 for path, md5 in inputs.items()} | {
            "Data-Version": own.tags["vitprune.data_version"],
            "Base-Commit": own.tags["vitprune.base_commit"],
            "MLflow-Run": own.run,
            "Prefect-Flow-Run": self.flow_run_id,
            "Model-SHA256": facts["challenger_sha256"],
            "Compared-With": own.against,
            "Difference": difference,
        }


@dataclass(frozen=True)
class _Challenger:
    models: "Registry"
    place: Path
    run: str
    tags: Mapping[str, str]
    facts: Mapping[str, Any]
    against: str


def _flow_of(place: Path) -> str:
    """The id of the compress flow's run, which its journal is named after."""
    return next((place / STATE / "journal" / MIRRORED).glob("*.jsonl")).stem


def _judged(place: Path, champion: Path | None) -> dict[str, Any]:
    """Compare with the champion and apply the gates in a process of its own, as torch is no guest of a flow's."""
    command = [sys.executable, "-m", "vitprune.cli", "judge", "--project", str(place)]
    command += ["--champion", str(champion)] if champion else []
    done = subprocess.run(
        command, cwd=place, env=environment(place), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode not in (0, 1) or not (place / COMPARISON).is_file():
        raise _Fault(f"judge: {(done.stderr.strip().splitlines() or ['no word why'])[-1]}; kept in {place}")
    facts: dict[str, Any] = json.loads((place / COMPARISON).read_text(encoding="utf-8"))
    return facts


def _failed(facts: Mapping[str, Any]) -> str:
    failed = [gate for gate in facts["gates"] if not gate["holds"]]
    return "; ".join(f"{gate['name']} is {gate['measured']}, asked is {gate['asked']}" for gate in failed)


def _publish(facts: Mapping[str, Any], against: str) -> None:
    lines = [f"# Challenger against {against}", "", "| gate | asked | measured | holds |", "|---|---|---|---|"]
    lines += [
        f"| {g['name']} | {g['asked']} | {g['measured']} | {'yes' if g['holds'] else 'NO'} |" for g in facts["gates"]
    ]
    lines.append(f"\nOf {facts['images']} images it lost {facts['lost']} and won {facts['won']}.")
    with contextlib.suppress(Exception):  # a server that refuses a page costs the run nothing
        create_markdown_artifact("\n".join(lines), key="gates", description="What the challenger had to hold")
