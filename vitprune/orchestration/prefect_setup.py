"""Prefect's settings, its server, its console log, and the flows of a project.

Prefect reads its settings from the environment when it is imported; this module imports it only in functions.
"""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.orchestration.embedded_server import start_server
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.processes import MARK
from vitprune.runtime.messages import first_line

LOST_SERVER = "VITPRUNE_LOST_PREFECT"  # address of the server that a run was started with and that died


def configure_prefect(project: Path) -> tuple[list[str], Callable[[], None]]:
    """Set the environment variables of Prefect; start a server if none is configured or the configured one is lost.

    Args:
        project: The project's directory; the embedded server's database is in its .vitprune folder.

    Returns:
        Messages for the user, one line each, and a function that waits until the started server answers.
    """
    os.environ[MARK] = str(project)
    for name, value in {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}.items():
        os.environ.setdefault(name, value)
    lost, server = os.environ.pop(LOST_SERVER, None), os.environ.get("PREFECT_API_URL")
    if server and not server_answers(server):
        lost = server
        del os.environ["PREFECT_API_URL"]
    notes = [f"Prefect server {lost} does not answer: this run is recorded by an embedded server"] if lost else []
    if "PREFECT_API_URL" in os.environ:
        return notes, lambda: None
    home = os.environ.setdefault("PREFECT_HOME", str(project / STATE / "prefect"))
    Path(home).mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_API_URL"], wait = start_server()
    return notes, wait


def server_answers(server: str) -> bool:
    """Whether a Prefect server and its database answer; a rejected request (no API key) is an answer too."""
    try:
        urllib.request.urlopen(f"{server.rstrip('/')}/ready", timeout=15).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False
    return True


def prepared_flow(project: Path, name: str, home: Path | None = None) -> tuple[Any, list[str]]:
    """Configure Prefect, start its server if it needs one, and load a flow of a project.

    Args:
        project: The project's directory.
        name: compress, retrain or sweep.
        home: Directory with the .vitprune folder of an embedded server's database; None: the project's.

    Returns:
        The Prefect flow, and the messages for the user, which have been printed.

    Raises:
        BadInput: the flow cannot be loaded, or the server does not start.
    """
    notes, wait_for_server = configure_prefect(home or project)
    for note in notes:
        print(note, flush=True)
    flow = load_flow(project, name)  # while the server starts
    show_flow_log()
    wait_for_server()
    return flow, notes


def load_flow(project: Path, name: str) -> Any:
    """Load a flow of a project, flows/NAME.py:NAME, as Prefect's deployments do.

    Args:
        project: The project's directory.
        name: compress, retrain or sweep.

    Returns:
        The Prefect flow.

    Raises:
        BadInput: the file is missing, cannot be imported or has no such flow.
    """
    from prefect.flows import load_flow_from_entrypoint

    path = project / "flows" / f"{name}.py"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; copy flows/ from a new project (vitprune init DIR writes it)")
    try:
        return load_flow_from_entrypoint(f"{path}:{name}", use_placeholder_flow=False)
    except Exception as error:  # the file is the user's: importing it can raise anything
        reason = error.__cause__ or getattr(error, "user_exc", None) or error
        raise BadInput(
            f"{path}: cannot load the flow {name} ({type(reason).__name__}: {first_line(reason)}); correct the file"
        ) from None


def show_flow_log() -> None:
    """Print only the log lines of flows and tasks on the console; Prefect's own lines go to its server."""
    import prefect

    internals = Path(prefect.__file__).parent

    def is_ours(record: logging.LogRecord) -> bool:
        record.stage = vars(record).get("task_run_name", "flow")
        from_run = record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))
        return from_run and not Path(record.pathname).is_relative_to(internals)

    for handler in logging.getLogger().handlers:  # Prefect's console handler
        handler.addFilter(is_ours)
        handler.setFormatter(logging.Formatter("%(asctime)s %(stage)-9s %(message)s", "%H:%M:%S"))
