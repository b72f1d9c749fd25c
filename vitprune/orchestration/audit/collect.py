"""Everything that an audit looks at, brought together in a scratch folder from a run of MLflow."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from vitprune.orchestration.execution.dvc_cache import (
    Store,
    cache_of,
    fetch,
    is_cached,
    pointers,
    read_lock,
    take_settings,
)
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.tracking.journal import read
from vitprune.orchestration.tracking.upload import JOURNAL, KEY

RECORDED = ("params.yaml", "dvc.yaml", "dvc.lock")


class Unusable(Exception):
    """There is nothing to audit, or it cannot be reached; one line that says what to do."""


@dataclass(frozen=True)
class Evidence:
    """A run as MLflow has it, its journal, and in `tree` its commit with the files that its dvc.lock names.

    `stages` are the runs that hold the files of each stage, which for a cached one is the run that computed it.
    `missing` says what could not be had, by what it was to be.
    """

    client: MlflowClient
    parent: Run
    project: Path
    scratch: Path
    facts: list[dict[str, Any]]
    stages: Mapping[str, Run]
    cycles: Mapping[int, Run]
    store: Store
    missing: list[str] = field(default_factory=list)

    @property
    def records(self) -> Path:
        """The files of MLflow: of the run itself, and in folders by name those of stages and cycles."""
        return self.scratch / "mlflow"

    @property
    def tree(self) -> Path:
        """The project as the run left it."""
        prefix: str = self.parent.data.tags.get("vitprune.git_prefix", "")
        return self.scratch / "tree" / prefix

    @property
    def commit(self) -> str:
        """The git commit that the run began at; empty outside git."""
        return str(self.parent.data.tags.get("mlflow.source.git.commit", ""))

    def stage_fact(self, stage: str) -> dict[str, Any]:
        """What the journal says about a stage."""
        return next((f for f in self.facts if f["fact"] == "stage" and f["stage"] == stage), {})

    def record_of(self, stage: str, cycle: int | None = None) -> Path:
        """The folder of what MLflow has of a stage or a cycle."""
        return self.records / (stage if cycle is None else f"{stage}-{cycle:02d}")


@contextmanager
def gathered(client: MlflowClient, run_id: str, project: Path | None, scratch: Path) -> Iterator[Evidence]:
    """Bring together what belongs to a run; the project is the run's own unless another clone is named.

    Raises:
        Unusable: there is no such run, it is not one of vitprune-flow, or it did not finish.
    """
    parent = _parent(client, run_id)
    place = (project or _project_of(parent)).resolve()
    if not place.is_dir():
        raise Unusable(f"{place}: no such directory; name a clone of the project by --project")
    evidence = _downloaded(client, parent, place, scratch)
    worktree = scratch / "tree"
    try:
        _check_out(evidence, worktree)
        yield evidence
    finally:
        if (worktree / ".git").exists():
            git(place, "worktree", "remove", "--force", str(worktree))


def git(where: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run git, which asks nothing and fires no hook."""
    env = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-c", "core.hooksPath=/dev/null", *words]
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)


def _parent(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise Unusable(f"run {run_id}: {str(error).splitlines()[0]}") from None
    key = run.data.tags.get(KEY, "")
    if not key or "/" in key:
        raise Unusable(f"run {run_id}: not the parent run of a vitprune-flow; take the id that the flow has printed")
    if run.info.status != "FINISHED":
        raise Unusable(f"run {run_id}: ended as {run.info.status}; only a finished run can be audited")
    return run


def _project_of(parent: Run) -> Path:
    """The project that a run was in; that of a retraining had a worktree below it, which may have gone."""
    place = Path(parent.data.tags.get("vitprune.project", "."))
    return next((found for found in (place, *place.parents) if (found / "dvc.yaml").is_file()), place)


def _downloaded(client: MlflowClient, parent: Run, project: Path, scratch: Path) -> Evidence:
    records: Path = scratch / "mlflow"
    missing: list[str] = []
    _download(client, parent, records)
    unkept = [name for name in (*RECORDED, JOURNAL) if not (records / name).is_file()]
    missing += [f"{name}: MLflow has no such file of run {parent.info.run_id}" for name in unkept]
    own = _by_tag(client, parent, "vitprune.dvc_stage")
    stages: dict[str, Run] = {}
    for stage in STAGES:
        if stage not in own:
            missing.append(f"{stage}: MLflow has no run of this stage")
            continue
        stages[stage] = _holder(client, own[stage])
        _download(client, stages[stage], records / stage)
    cycles = {}
    if "prune" in stages:
        found = _by_tag(client, stages["prune"], "vitprune.cycle")
        cycles = {int(number): run for number, run in found.items()}
        for number, run in cycles.items():
            _download(client, run, records / f"prune-{number:02d}")
    facts = read(records / JOURNAL) if (records / JOURNAL).is_file() else []
    store = Store(cache_of(project), scratch / "objects")
    return Evidence(client, parent, project, scratch, facts, stages, cycles, store, missing)


def _holder(client: MlflowClient, run: Run) -> Run:
    """The run that holds a stage's files: itself, or the one that computed what it found in DVC's cache."""
    source = run.data.tags.get("vitprune.computed_by")
    try:
        return client.get_run(source) if source else run
    except MlflowException:
        return run


def _by_tag(client: MlflowClient, parent: Run, tag: str) -> dict[str, Run]:
    wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    found = client.search_runs([parent.info.experiment_id], wanted, max_results=1000)
    return {run.data.tags[tag]: run for run in found if tag in run.data.tags}


def _download(client: MlflowClient, run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if client.list_artifacts(run.info.run_id):
        client.download_artifacts(run.info.run_id, "", str(folder))


def _check_out(evidence: Evidence, worktree: Path) -> None:
    """Lay out the run's commit, then over it what the run recorded and what its dvc.lock names."""
    made = evidence.commit and git(
        evidence.project, "worktree", "add", "--detach", "--force", str(worktree), evidence.commit
    )
    if made and made.returncode:
        evidence.missing.append(f"git: commit {evidence.commit} is not in {evidence.project}; fetch it")
    tree = evidence.tree
    tree.mkdir(parents=True, exist_ok=True)
    for name in RECORDED:
        if (evidence.records / name).is_file():
            shutil.copyfile(evidence.records / name, tree / name)
    if not (tree / "dvc.lock").is_file():
        return
    try:
        lock = read_lock(tree / "dvc.lock")
        _fill(evidence, lock)
    except Exception as error:  # a dvc.lock that somebody has edited may be anything
        evidence.missing.append(f"dvc.lock: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})")


def _fill(evidence: Evidence, lock: Mapping[str, Any]) -> None:
    tree, store = evidence.tree, evidence.store
    if store.lacks(lock):
        take_settings(evidence.project, tree)
        if error := fetch(tree, store.own, *lock):
            evidence.missing.append(f"DVC: not in the cache, and no remote gave it ({error})")
    for file in store.files(lock):
        record = evidence.record_of(file.stage) / file.path
        source = store.path_of(file.md5) if is_cached(file.path) else record
        place = tree / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        if source.is_file():
            place.symlink_to(source)
        else:
            where = "DVC's cache or remote" if is_cached(file.path) else "MLflow"
            evidence.missing.append(f"{file.path}: is not in {where}")
    _link_inputs(evidence)
    for entry in lock.values():
        for dep in entry.get("deps", ()):
            _link_other(evidence, str(dep["path"]))


def _link_inputs(evidence: Evidence) -> None:
    """Lay out what the .dvc files of the run's commit name."""
    for pointer, entry in pointers(evidence.tree).items():
        if evidence.store.lacks({pointer: entry}) and fetch(evidence.tree, evidence.store.own, pointer):
            continue  # the project's own, if it has it
        for file in evidence.store.files({pointer: entry}):
            place = evidence.tree / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(evidence.store.path_of(file.md5))


def _link_other(evidence: Evidence, path: str) -> None:
    """Let an input that neither git nor DVC gives, such as a folder of images, be the project's own."""
    place, original = evidence.tree / path, evidence.project / path
    if not place.exists() and original.exists() and not Path(path).is_absolute():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(original)
