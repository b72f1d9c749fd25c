"""Upload the run logs that MLflow does not have yet (`vitprune sync`)."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vitprune.orchestration.execution.lock_and_repair import STATE, Busy, exclusive
from vitprune.orchestration.tracking.journal import RunLog, read_log
from vitprune.orchestration.tracking.kept_files import archive, archived, restore
from vitprune.orchestration.tracking.live_curves import delete_live_run
from vitprune.runtime.commands import git
from vitprune.runtime.files import read_json
from vitprune.runtime.messages import first_line
from vitprune.runtime.untrusted import without_credentials

DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # what a run log with other content can raise


@dataclass(frozen=True)
class UploadResult:
    """Result of an upload.

    Attributes:
        done: Number of flow runs uploaded.
        missed: Number of flow runs that could not be uploaded.
        run_id: MLflow run of the newest one; empty if there is none.
        experiment_id: Its experiment.
        uri: Tracking URI.
        error: Reason of the first failure, or the files that are lost; empty if there is none.
        versions: Number of model versions that were registered again.
    """

    done: int
    missed: int
    run_id: str = ""
    experiment_id: str = ""
    uri: str = ""
    error: str = ""
    versions: int = 0


def replay(project: Path, flow_run_id: str | None = None) -> UploadResult:
    """Upload every run log that is not in MLflow; idempotent.

    Without `flow_run_id`, the logs that were uploaded before are looked up too: MLflow's store may have been lost.

    Args:
        project: The project's directory.
        flow_run_id: Flow run of a caller that holds the project's lock; None: the log of an active run is skipped.

    Returns:
        What was uploaded.
    """
    with upload_lock(project):
        pending = _pending(project, flow_run_id)
        kept = archived(project) if flow_run_id is None else []
        return _upload(project, pending, kept) if pending or kept else UploadResult(0, 0)


def replay_all(project: Path) -> UploadResult:
    """Upload every run log of a project, of its sweeps and of its retrainings; register versions again that are lost.

    All go to the project's store.

    Raises:
        BadInput: MLflow does not answer, or the project's copy of the registry is damaged.
    """
    from vitprune.orchestration.tracking.registry_copy import restore_versions
    from vitprune.orchestration.tracking.store import mlflow_session, tracking_uri

    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(project))
    results = [replay(project), *(replay(run) for run in _other_runs(project) if (run / STATE / "journal").is_dir())]
    newest = next((result for result in results if result.uri), results[0])
    done, missed = sum(result.done for result in results), sum(result.missed for result in results)
    errors, versions = [result.error for result in results if result.error], 0
    if newest.uri and not missed:
        with mlflow_session(project), upload_lock(project):
            versions, lost = restore_versions(project)
        errors += lost
    error = errors[0] if errors else ""
    return replace(newest, done=done, missed=missed, error=error, versions=versions)


def _other_runs(project: Path) -> Iterator[Path]:
    """Yield the directories of the sweeps' runs, and of the retrainings that are kept."""
    for path in sorted(project.glob(f"{STATE}/sweeps/*/sweep.json")):
        yield from (path.parent / run["directory"] for run in read_json(path)["runs"])
    kept = sorted(project.glob(f"{STATE}/retrain/*"))
    prefix = git(project, "rev-parse", "--show-prefix").stdout.strip() if kept else ""
    yield from (worktree / prefix for worktree in kept)


def replay_as_dict(project: str, flow_run_id: str | None) -> dict[str, Any]:
    """Call `replay` with plain values as arguments and result, for `isolated.call`."""
    return asdict(replay(Path(project), flow_run_id))


def _upload(project: Path, pending: list[RunLog], kept: list[RunLog]) -> UploadResult:
    # imported here: callers with nothing to upload, or that need only the types, do not load MLflow
    from mlflow.exceptions import MlflowException

    from vitprune.orchestration.tracking.store import TrackingError, open_client, short_timeouts, tracking_uri
    from vitprune.orchestration.tracking.upload import Uploader, has_run

    uri, run, experiment, done, reasons = tracking_uri(project), "", "", 0, list[str]()
    total = len(pending) + len(kept)
    try:
        client, experiment = open_client(project)
        with short_timeouts(60):  # large files take time
            missing = [run_log for run_log in kept if not has_run(client, experiment, run_log.flow_run_id)]
            total = len(missing) + len(pending)
            for run_log in [*missing, *pending]:
                try:
                    lost = restore(run_log) if run_log in missing else frozenset()
                    run = Uploader(client, experiment, run_log, lost).upload()
                    delete_live_run(client, experiment, run_log.flow_run_id)
                except MlflowException as error:
                    if error.error_code != "INVALID_PARAMETER_VALUE":
                        raise
                    reasons.append(f"{run_log.path}: {first_line(error)}")
                except DAMAGED as error:  # it was modified; the other logs are uploaded
                    reasons.append(f"{run_log.path}: cannot be uploaded ({type(error).__name__}: {first_line(error)})")
                else:
                    reasons += [f"run {run}: lost, and in no cache: {', '.join(sorted(lost))}"] if lost else []
                    archive(run_log)
                    done += 1
    except (MlflowException, TrackingError, OSError) as error:
        reasons.append(first_line(error))
    reason = without_credentials(reasons[0]) if reasons else ""
    return UploadResult(done, total - done, run, experiment, without_credentials(uri), reason)


def _pending(project: Path, flow_run_id: str | None) -> list[RunLog]:
    """Return the run logs not uploaded yet, oldest first, without that of an active run."""
    folder, busy = project / STATE / "journal", flow_run_id is None and _is_busy(project)
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [RunLog(project, path.stem) for path in paths if path.is_file() and _is_pending(path, busy)]


def _is_pending(path: Path, busy: bool) -> bool:
    """Whether a run log is uploaded: it has a start, and an end unless no flow is active; or it is damaged."""
    try:
        events = {fact["fact"] for fact in read_log(path)}
    except DAMAGED:
        return True
    return "start" in events and ("end" in events or not busy)


def _is_busy(project: Path) -> bool:
    try:
        with exclusive(project):
            return False
    except Busy:
        return True


@contextmanager
def upload_lock(project: Path) -> Iterator[None]:
    """Allow one upload at a time: creating the store and its runs is not safe among several processes."""
    path = project / STATE / "upload.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
