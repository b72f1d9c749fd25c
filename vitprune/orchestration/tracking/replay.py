"""Upload the run logs that MLflow does not have yet (`vitprune sync`)."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitprune.orchestration.execution.lock_and_repair import STATE, Busy, exclusive
from vitprune.orchestration.tracking.journal import RunLog, read_log
from vitprune.runtime.messages import first_line
from vitprune.runtime.untrusted import without_credentials

UPLOADED = "uploaded"  # directory of the logs that MLflow has


@dataclass(frozen=True)
class UploadResult:
    """Result of an upload.

    Attributes:
        done: number of flow runs uploaded.
        missed: number of flow runs that could not be uploaded.
        run_id: MLflow run of the newest one; empty if there is none.
        experiment_id: its experiment.
        uri: tracking URI.
        error: reason of the first failure; empty if there is none.
    """

    done: int
    missed: int
    run_id: str = ""
    experiment_id: str = ""
    uri: str = ""
    error: str = ""


def replay(project: Path, flow_run_id: str | None = None) -> UploadResult:
    """Upload every run log that is not in MLflow yet; idempotent.

    Args:
        project: the project's directory.
        flow_run_id: flow run of a caller that holds the project's lock; None: the log of an active run is skipped.

    Returns:
        What was uploaded.
    """
    with _upload_lock(project):
        pending = _pending(project, flow_run_id)
        return _upload(project, pending) if pending else UploadResult(0, 0)


def replay_as_dict(project: str, flow_run_id: str | None) -> dict[str, Any]:
    """Call `replay` with plain values as arguments and result, for `isolated.call`."""
    return asdict(replay(Path(project), flow_run_id))


def _upload(project: Path, pending: list[RunLog]) -> UploadResult:
    # imported here: callers with nothing to upload, or that need only the types, do not load MLflow
    from mlflow.exceptions import MlflowException

    from vitprune.orchestration.tracking.store import open_client, short_timeouts, tracking_uri
    from vitprune.orchestration.tracking.upload import Uploader

    uri, run, experiment, done, reason = tracking_uri(project), "", "", 0, ""
    try:
        client, experiment = open_client(project)
        with short_timeouts(60):  # large files take time
            for run_log in pending:
                try:
                    run = Uploader(client, experiment, run_log).upload()
                except ValueError as error:  # its files were modified; the other logs are uploaded
                    reason = without_credentials(first_line(error))
                    continue
                _archive(run_log)
                done += 1
    except (MlflowException, OSError) as error:
        reason = without_credentials(first_line(error))
    return UploadResult(done, len(pending) - done, run, experiment, without_credentials(uri), reason)


def _pending(project: Path, flow_run_id: str | None) -> list[RunLog]:
    """Return the run logs not uploaded yet, oldest first, without that of an active run."""
    folder = project / STATE / "journal"
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    if flow_run_id is None and _is_busy(project):
        paths = [path for path in paths if any(fact["fact"] == "end" for fact in read_log(path))]
    paths = [path for path in paths if any(fact["fact"] == "start" for fact in read_log(path))]
    return [RunLog(project, path.stem) for path in paths]


def _archive(run_log: RunLog) -> None:
    folder = run_log.path.parent / UPLOADED
    folder.mkdir(exist_ok=True)
    os.replace(run_log.path, folder / run_log.path.name)
    shutil.rmtree(run_log.spool, ignore_errors=True)  # last: until here an interrupted upload can be repeated


def _is_busy(project: Path) -> bool:
    try:
        with exclusive(project):
            return False
    except Busy:
        return True


@contextmanager
def _upload_lock(project: Path) -> Iterator[None]:
    """Allow one upload at a time: creating the store and its runs is not safe among several processes."""
    path = project / STATE / "upload.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
