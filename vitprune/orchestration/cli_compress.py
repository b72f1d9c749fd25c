"""`vitprune run`: run the flow compress and print its result."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import BadInput
from vitprune.orchestration.execution.lock_and_repair import exclusive
from vitprune.orchestration.interrupts import run_interruptibly
from vitprune.orchestration.prefect_setup import LOST_SERVER, prepared_flow, server_answers

if TYPE_CHECKING:
    from vitprune.orchestration.compress import Outcome

STOPPED = "stopped; run again to continue (training saves a checkpoint first, Ctrl-C again skips it)"


def run_pipeline(project: Path, stage_limit: float | None) -> int:
    """Run the flow compress of a project.

    Args:
        project: The project's directory.
        stage_limit: Seconds after which a stage is killed; None: no limit.

    Returns:
        Exit code: 0 success, 1 failure, 2 bad input, 130 interrupted.

    Raises:
        BadInput: this is no project, it is locked by another run, or a stage limit is not positive.
    """
    check_stage_limit(stage_limit)
    project = checked_project(project)
    try:
        with exclusive(project):
            pass
    except OSError as error:
        raise BadInput(f"{error.filename or project}: {error.strerror or error}") from None
    return run_interruptibly(lambda interrupted: _run(project, stage_limit, interrupted), STOPPED)


def checked_project(directory: Path) -> Path:
    """Return the absolute path of a project.

    Raises:
        BadInput: dvc.yaml or params.yaml is missing.
    """
    project = directory.resolve()
    for name in ("dvc.yaml", "params.yaml"):
        if not (project / name).is_file():
            raise BadInput(
                f"{project / name}: no such file; give a project by --project, or create one: vitprune init DIR"
            )
    return project


def check_stage_limit(stage_limit: float | None) -> None:
    """Raise BadInput if a stage limit is not positive."""
    if stage_limit is not None and not stage_limit > 0:
        raise BadInput(f"--stage-limit {stage_limit:g}: must be more than 0 seconds")


def _run(project: Path, stage_limit: float | None, interrupted: Callable[[], bool]) -> int:
    compress, notes = prepared_flow(project, "compress")
    from vitprune.orchestration.compress import Outcome  # imports Prefect, which reads its settings then

    try:
        state = compress(project, stage_limit, return_state=True)
        result: object = state.result(raise_on_failure=False)
        message = state.message or str(result)
    except Exception as error:  # Prefect's own exceptions, if its server fails during a run
        result, message = error, str(error) or type(error).__name__
    if not isinstance(result, Outcome) and not interrupted():
        server = os.environ.get("PREFECT_API_URL")
        if server and not server_answers(server):  # start again without it; finished stages are in the DVC cache
            os.environ[LOST_SERVER] = os.environ.pop("PREFECT_API_URL")
            command = [sys.executable, "-m", "vitprune.cli", "run", "--project", str(project)]
            command += [] if stage_limit is None else ["--stage-limit", str(stage_limit)]
            os.execv(sys.executable, command)
    if not isinstance(result, Outcome):
        result = Outcome(error=message.splitlines()[0], exit_code=1)
    _print_outcome(project, result, notes)
    return result.exit_code


def _print_outcome(project: Path, outcome: "Outcome", notes: list[str]) -> None:
    from vitprune.orchestration.compress import summary_line
    from vitprune.pipeline.report.inputs import read_commit

    if not outcome.error:
        _print_table(project)
        print(summary_line(outcome.results))
        print(f"report: {project / 'out/report/report.html'}")
        if read_commit(project) is None:
            print("the project has no commit, so `vitprune audit` cannot verify this run: commit it and run again")
    upload = outcome.upload
    if upload.missed:
        print(
            f"MLflow was not reached ({upload.error[:160]}); nothing is lost: "
            f"`vitprune sync --project {project}` uploads the {upload.missed} missing runs"
        )
    elif upload.uri:
        from vitprune.orchestration.prefect_artifacts import how_to_open, link

        print(f"MLflow: {upload.uri}, run {upload.run_id}")
        print(f"its page: {link(upload)}. {how_to_open(upload)}")
    for note in notes:
        print(note)
    if outcome.error:
        print(f"Error: {outcome.error}", file=sys.stderr)


def _print_table(project: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from vitprune.orchestration.summary import rows
    from vitprune.pipeline.report.inputs import read_evaluation

    measured = read_evaluation(project / "metrics")
    if measured is None:
        return
    table = Table()
    for name in ("", "dense", "pruned"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(measured):
        table.add_row(*row)
    Console().print(table)
