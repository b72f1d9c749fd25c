"""`vitprune audit` and `vitprune sync`."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import BadInput
from vitprune.orchestration.execution.lock_and_repair import STATE

if TYPE_CHECKING:
    from vitprune.orchestration.audit.collect import CollectedRun


def audit_run(run_id: str, project: Path | None, list_all: bool, rerun: bool) -> int:
    """Run all checks of a run, print the result of each, then PASS or FAIL.

    Args:
        run_id: id of the MLflow run, as `vitprune run` prints it.
        project: a clone of the project; None: the project that the run names.
        list_all: print all differences; else stop after the first.
        rerun: also rerun all stages in a clean worktree and compare.

    Returns:
        The number of differences printed.

    Raises:
        BadInput: there is no such run, or it did not finish.
    """
    from mlflow import MlflowClient

    from vitprune.orchestration.audit.collect import AuditError, collect
    from vitprune.orchestration.tracking.store import TrackingError, mlflow_session, tracking_uri

    directory, differences = (project or Path()).resolve(), 0
    try:
        with (
            tempfile.TemporaryDirectory(prefix="vitprune-audit-") as scratch,
            mlflow_session(directory),
            collect(MlflowClient(tracking_uri=tracking_uri(directory)), run_id, project, Path(scratch)) as collected,
        ):
            for name, check in _checks(collected, rerun):
                lines = list(islice(check, None if list_all else 1))
                for line in lines or ["as recorded"]:
                    print(f"{name}: {line}", flush=True)
                differences += len(lines)
                if lines and not list_all:
                    break
    except (AuditError, TrackingError) as error:
        raise BadInput(str(error)) from None
    except BadInput as error:  # a record that was changed after the run
        print(f"complete: {error}")
        differences += 1
    print("PASS" if not differences else "FAIL" + (f": {differences} differences" if list_all else ""))
    return differences


def _checks(collected: "CollectedRun", rerun: bool) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield every check with its differences: first the records, then the recomputed values."""
    from vitprune.orchestration.audit import rerun as rerun_check
    from vitprune.orchestration.audit.records import CHECKS, run_check
    from vitprune.pipeline import verify

    for name in CHECKS:
        yield name, run_check(name, collected)
    for name in verify.CHECKS:
        yield name, _recomputed(collected.tree, name)
    if rerun:
        yield "rerun", rerun_check.rerun(collected)


def _recomputed(tree: Path, name: str) -> Iterator[str]:
    from vitprune.config.params import load_params
    from vitprune.pipeline.verify import recheck

    with contextlib.chdir(tree):
        try:
            yield from recheck(name, load_params(Path("params.yaml")))
        except BadInput as error:
            yield str(error)


def upload_missing_runs(project: Path, as_json: bool) -> int:
    """Upload the run logs that MLflow does not have, or has lost, and print how many.

    Args:
        project: the project's directory.
        as_json: print the result as JSON.

    Returns:
        Exit code: 0 if nothing is left to upload, else 1.

    Raises:
        BadInput: the project has no run.
    """
    from vitprune.orchestration.tracking.replay import replay_with_sweeps

    project = project.resolve()
    if not (project / STATE).is_dir():
        raise BadInput(f"{project}: has no run of `vitprune run`; give the project by --project")
    result = replay_with_sweeps(project)
    runs = f"{result.done} run{'' if result.done == 1 else 's'}"
    if as_json:
        print(json.dumps(asdict(result)))
    elif result.missed:
        print(f"uploaded {runs}; not uploaded: {result.missed} ({result.error})", file=sys.stderr)
    else:
        print(f"uploaded {runs} to {result.uri}" if result.done else "nothing to upload")
        if result.error:
            print(result.error, file=sys.stderr)
    return 1 if result.missed else 0
