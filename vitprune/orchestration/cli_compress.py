"""`vitprune-flow`: sets up Prefect's surroundings before Prefect is imported, runs the flow, and says how it went.

Prefect reads its settings from the environment while it is imported, hence a module of its own.
"""

import argparse
import logging
import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from vitprune.orchestration.execution.lock_and_repair import STATE, Busy, exclusive
from vitprune.orchestration.execution.processes import MARK

if TYPE_CHECKING:
    from vitprune.orchestration.compress import Outcome

LOST = "VITPRUNE_LOST_PREFECT"  # the address of the server that a run began with and lost


def main() -> None:
    """Run `vitprune-flow`."""
    options = _options()
    project = project_of(options)
    try:
        with exclusive(project):
            pass
    except Busy as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"{error.filename or project}: {error.strerror or error}")
    signal.signal(signal.SIGTERM, interrupt)
    notes = settle(project)
    for note in notes:
        print(note, flush=True)
    try:
        sys.exit(_run(project, options.stage_limit, notes))
    except KeyboardInterrupt:
        print("\nstopped; start again to go on from the last finished stage", file=sys.stderr)
        sys.exit(130)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vitprune-flow", description="Bring all stages of a project up to date.")
    parser.add_argument("--project", type=Path, default=Path("."), help="the project's directory (default: here)")
    parser.add_argument("--stage-limit", type=float, help="seconds after which a stage is killed (default: none)")
    options = parser.parse_args()
    if options.stage_limit is not None and not options.stage_limit > 0:
        refuse(f"--stage-limit {options.stage_limit:g}: must be more than 0 seconds")
    return options


def settle(project: Path) -> list[str]:
    """Set the environment that Prefect is to be imported in; what the user should know, a line each."""
    os.environ[MARK] = str(project)
    for name, value in {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }.items():
        os.environ.setdefault(name, value)
    notes = []
    lost, server = os.environ.pop(LOST, None), os.environ.get("PREFECT_API_URL")
    if server and not answers(server):
        lost = server
        del os.environ["PREFECT_API_URL"]
    if lost:
        notes.append(f"Prefect server {lost} does not answer: this run is recorded by the embedded one")
    if "PREFECT_API_URL" not in os.environ:
        os.environ.setdefault("PREFECT_HOME", str(project / STATE / "prefect"))
        os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "true"
    return notes


def answers(server: str) -> bool:
    """Whether a Prefect server and its database answer at all; a refusal (no key, say) is an answer too."""
    try:
        urllib.request.urlopen(f"{server.rstrip('/')}/ready", timeout=15).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False
    return True


def _run(project: Path, stage_limit: float | None, notes: list[str]) -> int:
    from vitprune.orchestration.compress import Outcome, compress

    quiet()
    try:
        state = compress(project, stage_limit, return_state=True)
        result: object = state.result(raise_on_failure=False)
        said = state.message or str(result)
    except Exception as error:  # Prefect's own, from a server that fails in the midst of a run
        result, said = error, str(error) or type(error).__name__
    if isinstance(result, Outcome):
        outcome = result
    else:
        server = os.environ.get("PREFECT_API_URL")
        if server and not answers(server):  # died under way: what is computed is in DVC's cache
            os.environ[LOST] = os.environ.pop("PREFECT_API_URL")
            os.execv(sys.executable, [sys.executable, "-m", "vitprune.orchestration.cli_compress", *sys.argv[1:]])
        outcome = Outcome(error=said.splitlines()[0], exit_code=1)
    _tell(project, outcome, notes)
    return outcome.exit_code


def quiet() -> None:
    """Let through to the console only what the flow itself says: the rest of Prefect's log goes to its server."""

    def ours(record: logging.LogRecord) -> bool:
        record.stage = vars(record).get("task_run_name", "flow")
        return Path(record.pathname).parent == Path(__file__).parent

    for handler in logging.getLogger().handlers:  # Prefect has put its console here
        handler.addFilter(ours)
        handler.setFormatter(logging.Formatter("%(asctime)s %(stage)-9s %(message)s", "%H:%M:%S"))


def _tell(project: Path, outcome: "Outcome", notes: list[str]) -> None:
    """Print the table, what was computed, and where everything is."""
    from vitprune.orchestration.compress import summary_line

    if not outcome.error:
        _table(project)
        print(summary_line(outcome.results))
        print(f"report: {project / 'out/report/report.html'}")
    mirrored = outcome.mirrored
    if mirrored.missed:
        print(
            f"MLflow was not reached ({mirrored.error[:160]}); nothing is lost: "
            f"`vitprune-track replay --project {project}` mirrors the {mirrored.missed} missed runs"
        )
    elif mirrored.uri:
        print(f"MLflow: {mirrored.uri}, run {mirrored.run_id}")
    for note in notes:
        print(note)
    if outcome.error:
        print(f"Error: {outcome.error}", file=sys.stderr)


def _table(project: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from vitprune.orchestration.summary import evaluation, rows

    measured = evaluation(project)
    if measured is None:
        return
    table = Table()
    for name in ("", "dense", "pruned"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(measured):
        table.add_row(*row)
    Console().print(table)


def project_of(options: argparse.Namespace) -> Path:
    """The directory that --project names, if it is a project."""
    project: Path = options.project.resolve()
    for name in ("dvc.yaml", "params.yaml"):
        if not (project / name).is_file():
            refuse(f"{project / name}: no such file; name a project by --project, or make one with `vitprune init`")
    return project


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2: what the user can cause and mend."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Take a signal for Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
