"""`vitprune audit` and `vitprune sync`."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import BadInput
from vitprune.orchestration.execution.lock_and_repair import STATE

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    from vitprune.orchestration.audit.collect import CollectedRun
    from vitprune.orchestration.audit.repeated import RepeatedStages


@dataclass(frozen=True)
class AuditOptions:
    """Options of `vitprune audit`.

    Attributes:
        list_all: Print all differences; else stop after the first.
        rerun: Also rerun all stages in a clean worktree and compare.
        trusted_keys: File of the public keys that may sign a run; None: signatures are not verified.
        limit: Seconds; a stage that took longer is not run again.
    """

    list_all: bool = False
    rerun: bool = False
    trusted_keys: Path | None = None
    limit: float = 60.0


def audit_run(run_id: str, project: Path | None, options: AuditOptions) -> int:
    """Run all checks of a run, print the result of each, what is not proven, then PASS or FAIL.

    Args:
        run_id: Id of the MLflow run, as `vitprune run` prints it.
        project: A clone of the project; None: the project that the run names.
        options: What to check and print.

    Returns:
        The number of differences printed.

    Raises:
        BadInput: there is no such run, it did not finish, or the file of keys is unusable.
    """
    from vitprune.orchestration.audit.repeated import repeated_stages

    with (
        tempfile.TemporaryDirectory(prefix="vitprune-audit-") as scratch,
        repeated_stages() as stages,  # imports them while this process imports MLflow
    ):
        return _audit(run_id, project, options, stages, Path(scratch))


def _audit(run_id: str, project: Path | None, options: AuditOptions, stages: "RepeatedStages", scratch: Path) -> int:
    from mlflow import MlflowClient

    from vitprune.orchestration.attestation.signing import trusted_keys
    from vitprune.orchestration.audit.collect import AuditError, collect
    from vitprune.orchestration.tracking.store import TrackingError, mlflow_session, require_store, tracking_uri

    keys = [] if options.trusted_keys is None else trusted_keys(options.trusted_keys)
    directory, differences = (project or Path()).resolve(), 0
    require_store(directory)
    notes: list[str] = []
    try:
        with (
            mlflow_session(directory),
            collect(MlflowClient(tracking_uri=tracking_uri(directory)), run_id, project, scratch) as collected,
        ):
            for name, check in _checks(collected, keys, options, stages):
                differences += _print_check(name, check, options.list_all, notes)
                if differences and not options.list_all:
                    break
    except (AuditError, TrackingError) as error:
        raise BadInput(str(error)) from None
    except BadInput as error:  # a record that was changed after the run
        print(f"complete: {error}")
        differences += 1
    if not differences or options.list_all:
        for line in ["Notes:", *(f"- {note}" for note in notes)] if notes else []:
            print(line)
    print("PASS" if not differences else "FAIL" + (f": {differences} differences" if options.list_all else ""))
    return differences


def _print_check(name: str, check: Iterator[str], list_all: bool, notes: list[str]) -> int:
    """Print the result of a check, and collect its notes; return the number of differences printed."""
    from vitprune.runtime.messages import Note

    differences, result = 0, "ok"
    for line in check:
        if isinstance(line, Note):
            notes.append(f"{name}: {line}")
            result = "see below"
            continue
        print(f"{name}: {line}", flush=True)
        differences += 1
        if not list_all:
            return differences
    if not differences:
        print(f"{name}: {result}", flush=True)
    return differences


def _checks(
    collected: "CollectedRun", keys: "Sequence[SSlibKey]", options: AuditOptions, stages: "RepeatedStages"
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield every check with its differences: first the records, then the recomputed values."""
    from vitprune.orchestration.audit import rerun
    from vitprune.orchestration.audit.attested import signature
    from vitprune.orchestration.audit.records import CHECKS, run_check
    from vitprune.pipeline import verify

    stages.start(collected, options.limit)
    yield "complete", run_check("complete", collected)
    yield "signature", signature(collected, keys)
    for name in CHECKS:
        if name != "complete":
            yield name, run_check(name, collected)
    for name in verify.CHECKS:
        is_repeated = name in verify.REPEATED
        yield name, stages.differences(name) if is_repeated else _recomputed(collected, name, options.limit)
    if options.rerun:
        yield "rerun", rerun.rerun(collected)


def _recomputed(collected: "CollectedRun", name: str, limit: float) -> Iterator[str]:
    from vitprune.config.params import load_params
    from vitprune.pipeline.verify import RecordedRun, recheck

    with contextlib.chdir(collected.tree):
        try:
            params = load_params(Path("params.yaml"))
            yield from recheck(name, RecordedRun(params, collected.outputs, collected.seconds, limit))
        except BadInput as error:
            yield str(error)


def upload_missing_runs(project: Path, as_json: bool) -> int:
    """Upload the run logs that MLflow does not have, or has lost, and print how many.

    Args:
        project: The project's directory.
        as_json: Print the result as JSON.

    Returns:
        Exit code: 0 if nothing is left to upload, else 1.

    Raises:
        BadInput: the project has no run, or MLflow does not answer.
    """
    from vitprune.orchestration.tracking.replay import replay_all

    project = project.resolve()
    if not (project / STATE).is_dir():
        raise BadInput(f"{project}: has no run of `vitprune run`; give the project by --project")
    result = replay_all(project)
    runs = f"{result.done} run{'' if result.done == 1 else 's'}"
    if as_json:
        print(json.dumps(asdict(result)))
    elif result.missed:
        print(f"uploaded {runs}; not uploaded: {result.missed} ({result.error})", file=sys.stderr)
    else:
        print(f"uploaded {runs} to {result.uri}" if result.done else "nothing to upload")
        if result.versions:
            print(f"registered {result.versions} version{'' if result.versions == 1 else 's'} again")
        if result.error:
            print(result.error, file=sys.stderr)
    return 1 if result.missed else 0
