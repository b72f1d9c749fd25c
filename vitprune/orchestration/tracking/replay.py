"""`vitprune-track`: mirrors to MLflow what the journals hold and MLflow does not have yet."""

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from vitprune.orchestration.execution.lock_and_repair import STATE, Busy, exclusive
from vitprune.orchestration.tracking.journal import RunLog, read

MIRRORED = "mirrored"


@dataclass(frozen=True)
class UploadResult:
    """What a replay did: flow runs mirrored and missed, the newest one's parent run, and why it stopped (or empty)."""

    done: int
    missed: int
    run_id: str = ""
    experiment_id: str = ""
    uri: str = ""
    error: str = ""


def replay(project: Path, flow_run_id: str | None = None) -> UploadResult:
    """Mirror every journal that is not in MLflow yet; a second replay finds nothing to do.

    `flow_run_id` is the run of a caller that holds the project's lock itself; without it, the journal of a run that is
    still at work is left alone.
    """
    with _alone(project):
        waiting = _waiting(project, flow_run_id)
        if not waiting:
            return UploadResult(0, 0)
        return _mirror(project, waiting)


def _mirror(project: Path, waiting: list[RunLog]) -> UploadResult:
    # here, so that a replay with nothing to do, and whoever only wants the types, does not pay for MLflow
    from mlflow.exceptions import MlflowException

    from vitprune.orchestration.tracking.store import open_client, short_patience, tracking_uri
    from vitprune.orchestration.tracking.upload import Uploader

    uri, run, experiment, done, why = tracking_uri(project), "", "", 0, ""
    try:
        client, experiment = open_client(project)
        with short_patience(60):  # it has answered; the time is for large files
            for journal in waiting:
                try:
                    run = Uploader(client, experiment, journal).put()
                except ValueError as error:  # this one's files are not what they were; the others can still go
                    why = _first_line(error)
                    continue
                _set_aside(journal)
                done += 1
    except (MlflowException, OSError) as error:
        why = _first_line(error)
    return UploadResult(done, len(waiting) - done, run, experiment, uri, why)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _waiting(project: Path, flow_run_id: str | None) -> list[RunLog]:
    """Return the journals not mirrored yet, oldest first, without that of a run still at work."""
    folder = project / STATE / "journal"
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    if flow_run_id is None and _is_busy(project):
        paths = [path for path in paths if any(fact["fact"] == "end" for fact in read(path))]
    paths = [path for path in paths if any(fact["fact"] == "start" for fact in read(path))]
    return [RunLog(project, path.stem) for path in paths]


def _set_aside(journal: RunLog) -> None:
    folder = journal.path.parent / MIRRORED
    folder.mkdir(exist_ok=True)
    os.replace(journal.path, folder / journal.path.name)
    shutil.rmtree(journal.spool, ignore_errors=True)  # last: what was cut off before this can be mirrored again


def _is_busy(project: Path) -> bool:
    try:
        with exclusive(project):
            return False
    except Busy:
        return True


@contextmanager
def _alone(project: Path) -> Iterator[None]:
    """Let one mirror at a time write: the store's first use and the search for a run are not safe otherwise."""
    path = project / STATE / "mirror.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Run `vitprune-track`."""
    parser = argparse.ArgumentParser(prog="vitprune-track", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("replay", help="mirror what a dead tracking server missed; twice changes nothing")
    command.add_argument("--project", type=Path, default=Path("."), help="the project's directory")
    command.add_argument("--flow-run", help=argparse.SUPPRESS)
    command.add_argument("--json", action="store_true", help="say it as JSON")
    options = parser.parse_args()
    project = options.project.resolve()
    if not (project / STATE).is_dir():
        sys.exit(_refuse(f"{project}: no run of vitprune-flow has been recorded here; name the project by --project"))
    result = replay(project, options.flow_run)
    if options.json:
        print(json.dumps(asdict(result)))
    elif result.missed:
        print(f"mirrored {result.done} runs; {result.missed} still wait: {result.error}", file=sys.stderr)
    else:
        print(f"mirrored {result.done} runs to {result.uri}" if result.done else "nothing to mirror")
    sys.exit(1 if result.missed else 0)


def _refuse(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
