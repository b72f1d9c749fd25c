"""Collect what an audit verifies, in a scratch folder: a run's MLflow records, run log, commit and files."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from vitprune.orchestration.attestation.statements import BUNDLE, LINK, Statement, read_chain
from vitprune.orchestration.execution.dvc_cache import Store, cache_dir, is_cached, pointers, read_lock, use_cache
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.tracking.journal import JOURNAL, read_log
from vitprune.orchestration.tracking.logged_model import KEY
from vitprune.runtime.commands import git
from vitprune.runtime.messages import first_line
from vitprune.runtime.untrusted import commit_id, path_inside, whole_number, without_credentials

RECORDED = ("params.yaml", "dvc.yaml", "dvc.lock")


class AuditError(Exception):
    """The run cannot be audited; one line that says what to do."""


@dataclass(frozen=True)
class CollectedRun:
    """A finished run: its MLflow records, its run log, and in `tree` its commit with the files of its dvc.lock.

    Attributes:
        client: Client of the tracking store.
        parent: The MLflow run of the flow.
        project: The project, or a clone of it.
        scratch: Folder into which everything is downloaded.
        facts: Lines of the run log.
        stages: For every stage the MLflow run that has its files; for a cached stage the run that computed it.
        cycles: MLflow run of every pruning cycle.
        store: DVC cache, and files fetched from the remote.
        prefix: Path of the project in its git repository, as git reports it (not MLflow's tag).
        missing: One message for every record or file that could not be collected.
    """

    client: MlflowClient
    parent: Run
    project: Path
    scratch: Path
    facts: list[dict[str, Any]]
    stages: Mapping[str, Run]
    cycles: Mapping[int, Run]
    store: Store
    prefix: str
    missing: list[str] = field(default_factory=list)

    @property
    def records(self) -> Path:
        """Folder of the files downloaded from MLflow, with a folder for every stage and cycle."""
        return self.scratch / "mlflow"

    @property
    def tree(self) -> Path:
        """The project as it was at the end of the run."""
        return self.scratch / "tree" / self.prefix

    @property
    def commit(self) -> str:
        """The git commit at the start of the run; empty outside git.

        Raises:
            BadInput: the tag is not a commit id.
        """
        commit = str(self.parent.data.tags.get("mlflow.source.git.commit", ""))
        return commit_id(commit, "tag mlflow.source.git.commit") if commit else ""

    @property
    def statements(self) -> list[Statement]:
        """The statements of the run's attestation.

        Raises:
            BadInput: the attestation was changed.
        """
        return read_chain(self.records / BUNDLE)

    @property
    def outputs(self) -> dict[str, list[str]]:
        """The paths that every stage wrote, as dvc.lock names them."""
        lock = read_lock(self.records / "dvc.lock")
        return {stage: [str(out["path"]) for out in entry.get("outs", ())] for stage, entry in lock.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """The computing time of every stage; for a cached stage that of the run that computed it."""
        return {stage: run.data.metrics.get("seconds", 0.0) for stage, run in self.stages.items()}

    def stage_fact(self, stage: str) -> dict[str, Any]:
        """Return the entry of a stage in the run log."""
        return next((f for f in self.facts if f["fact"] == "stage" and f["stage"] == stage), {})


@contextmanager
def collect(client: MlflowClient, run_id: str, project: Path | None, scratch: Path) -> Iterator[CollectedRun]:
    """Collect everything that belongs to a run, for as long as the block lasts.

    Args:
        client: Client of the tracking store.
        run_id: Id of the MLflow run, as `vitprune run` prints it.
        project: A clone of the project; None: the project that the run names.
        scratch: Empty folder to download into.

    Raises:
        AuditError: there is no such run, it is not a run of the pipeline, or it did not finish.
    """
    parent = _parent(client, run_id)
    root = (project or _project_of(parent)).resolve()
    if not root.is_dir():
        raise AuditError(f"{root}: no such directory; give a clone of the project by --project")
    collected = _download_all(client, parent, root, scratch)
    worktree = scratch / "tree"
    try:
        _check_out(collected, worktree)
        yield collected
    finally:
        if (worktree / ".git").exists():
            git(root, "worktree", "remove", "--force", str(worktree))


def _parent(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise AuditError(without_credentials(f"run {run_id}: {first_line(error)}")) from None
    key = run.data.tags.get(KEY, "")
    if not key or "/" in key or key in (".", ".."):
        raise AuditError(f"run {run_id}: not the parent run of a pipeline run; give the id that `vitprune run` printed")
    if run.info.status != "FINISHED":
        raise AuditError(f"run {run_id}: ended as {run.info.status}; only a finished run can be audited")
    return run


def _project_of(parent: Run) -> Path:
    """Return the project of a run; for a retraining, whose worktree may be deleted, the project above it."""
    recorded = Path(parent.data.tags.get("vitprune.project", "."))
    return next((path for path in (recorded, *recorded.parents) if (path / "dvc.yaml").is_file()), recorded)


def _download_all(client: MlflowClient, parent: Run, project: Path, scratch: Path) -> CollectedRun:
    records: Path = scratch / "mlflow"
    missing: list[str] = []
    _download(client, parent, records)
    absent = [name for name in (*RECORDED, JOURNAL, BUNDLE) if not (records / name).is_file()]
    missing += [f"{name}: MLflow has no such file in run {parent.info.run_id}" for name in absent]
    stage_runs = _by_tag(client, parent, "vitprune.dvc_stage")
    stages: dict[str, Run] = {}
    for stage in STAGES:
        if stage not in stage_runs:
            missing.append(f"{stage}: MLflow has no run of this stage")
            continue
        stages[stage] = _computing_run(client, stage_runs[stage])
        _download(client, stages[stage], records / stage)
    cycles = {}
    if "prune" in stages:
        cycle_runs = _by_tag(client, stages["prune"], "vitprune.cycle")
        cycles = {whole_number(number, "tag vitprune.cycle"): run for number, run in cycle_runs.items()}
        for number, run in cycles.items():
            _download(client, run, records / f"prune-{number:02d}")
    facts = read_log(records / JOURNAL) if (records / JOURNAL).is_file() else []
    store = Store(cache_dir(project), scratch / "objects")
    prefix = git(project, "rev-parse", "--show-prefix").stdout.strip()
    recorded = parent.data.tags.get("vitprune.git_prefix", "")
    if recorded != prefix:
        missing.append(f"tag vitprune.git_prefix: is {recorded!r}, git reports {prefix!r}")
    return CollectedRun(client, parent, project, scratch, facts, stages, cycles, store, prefix, missing)


def _computing_run(client: MlflowClient, run: Run) -> Run:
    """Return the run that has a stage's files: the run itself, or for a cached stage the one that computed it."""
    source = run.data.tags.get("vitprune.computed_by")
    try:
        return client.get_run(source) if source else run
    except MlflowException:
        return run


def _by_tag(client: MlflowClient, parent: Run, tag: str) -> dict[str, Run]:
    wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], wanted, max_results=1000)
    return {run.data.tags[tag]: run for run in children if tag in run.data.tags}


def _download(client: MlflowClient, run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if client.list_artifacts(run.info.run_id):
        client.download_artifacts(run.info.run_id, "", str(folder))


def _check_out(collected: CollectedRun, worktree: Path) -> None:
    """Check out the run's commit, then replace files by the recorded ones and by those of its dvc.lock."""
    words = ("--detach", "--force", "--end-of-options", str(worktree), collected.commit)
    if collected.commit and git(collected.project, "worktree", "add", *words).returncode:
        collected.missing.append(f"git: commit {collected.commit} is not in {collected.project}; run git fetch there")
    tree = collected.tree
    tree.mkdir(parents=True, exist_ok=True)
    for name in (*RECORDED, BUNDLE, LINK):
        if (collected.records / name).is_file():
            shutil.copyfile(collected.records / name, tree / name)
    if not (tree / "dvc.lock").is_file():
        return
    try:
        _fill(collected, read_lock(tree / "dvc.lock"))
    except Exception as error:  # a tampered dvc.lock can raise anything
        collected.missing.append(f"dvc.lock: cannot be read ({type(error).__name__}: {first_line(error)})")


def _fill(collected: CollectedRun, lock: Mapping[str, Any]) -> None:
    tree, store = collected.tree, collected.store
    if store.missing(lock):
        use_cache(tree, store.fetched, collected.project)
        if error := store.fetch(tree, *lock):
            collected.missing.append(f"DVC: outputs are not in the cache, and dvc fetch failed ({error})")
    for file in store.files(lock):
        record = path_inside(collected.records, file.stage, "dvc.lock") / file.path
        source = store.path_of(file.md5) if is_cached(file.path) else record
        path = path_inside(tree, file.path, "dvc.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if source.is_file():
            path.symlink_to(source)
        else:
            where = "DVC's cache or remote" if is_cached(file.path) else "MLflow"
            collected.missing.append(f"{file.path}: is not in {where}")
    _link_inputs(collected)
    for entry in lock.values():
        for dep in entry.get("deps", ()):
            _link_other(collected, str(dep["path"]))


def _link_inputs(collected: CollectedRun) -> None:
    """Link the data that the .dvc files of the run's commit track."""
    for pointer, entry in pointers(collected.tree).items():
        if collected.store.missing({pointer: entry}) and collected.store.fetch(collected.tree, pointer):
            continue  # _link_other links the project's copy
        for file in collected.store.files({pointer: entry}):
            path = path_inside(collected.tree, file.path, pointer)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(collected.store.path_of(file.md5))


def _link_other(collected: CollectedRun, path: str) -> None:
    """Link an input that neither git nor DVC tracks, such as a folder of images, to the project's copy."""
    if Path(path).is_absolute():
        return
    target, original = path_inside(collected.tree, path.rstrip("/"), "dvc.lock"), collected.project / path
    if not target.exists() and original.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(original)
