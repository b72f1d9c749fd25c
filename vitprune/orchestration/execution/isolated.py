"""Call a function in a new Python process.

The process of a flow does not import torch, and those of `compress` and `sweep` do not import MLflow: both take seconds
and memory, and a crash in them must not end the flow. Functions that need them are called by name, with strings as
arguments and a JSON value as result.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from vitprune.orchestration.execution.processes import process_environment
from vitprune.runtime.commands import captured, error_line
from vitprune.runtime.messages import first_line


class IsolatedCallError(Exception):
    """The function raised; its message in one line."""


def call(function: str, *arguments: str | None, project: Path) -> Any:
    """Call a function in a new process, in a project's directory and environment.

    Args:
        function: MODULE:FUNCTION.
        arguments: Strings for the function; None is passed on.
        project: Working directory of the process.

    Returns:
        The function's result, through JSON.

    Raises:
        IsolatedCallError: the function raised, or the process was killed.
    """
    command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, function, json.dumps(arguments)]
    completed = captured(command, project, process_environment(project))
    if completed.returncode:
        raise IsolatedCallError(error_line(completed))
    return json.loads(completed.stdout.splitlines()[-1])


def main() -> None:
    """Call the function named on the command line and print its result as one line of JSON."""
    module, _, name = sys.argv[1].partition(":")
    try:
        result = getattr(import_module(module), name)(*json.loads(sys.argv[2]))
    except Exception as error:  # its message is the result for the caller
        sys.exit(f"Error: {first_line(error)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
