"""Run git and DVC as subprocesses and return their output."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

Completed = subprocess.CompletedProcess[str]


def git(directory: Path, *arguments: str) -> Completed:
    """Run git without prompts and without hooks.

    Args:
        directory: Working directory of the command.
        arguments: Subcommand and options, such as "rev-parse", "HEAD".

    Returns:
        Exit code, stdout and stderr; exit code 127 where git is not installed.
    """
    command = ["git", "--no-optional-locks", "-c", "core.hooksPath=/dev/null", *arguments]
    return captured(command, directory, os.environ | {"GIT_TERMINAL_PROMPT": "0"})


def dvc(directory: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Completed:
    """Run the DVC of this Python environment; never with -q, which hides the reason of a failure.

    Args:
        directory: Working directory of the command.
        arguments: Subcommand and options, such as "config", "core.remote".
        env: Environment variables; None: those of this process.

    Returns:
        Exit code, stdout and stderr.
    """
    variables = dict(os.environ if env is None else env) | {"DVC_NO_ANALYTICS": "1"}
    return captured([sys.executable, "-m", "dvc", *arguments], directory, variables)


def error_line(completed: Completed) -> str:
    """Return the reason of a failed command in one line: its error line, else the last line of stderr."""
    lines = [line for line in completed.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Having any troubles?")]  # the last line of DVC
    errors = [line for line in lines if line.startswith(("ERROR: ", "Error: ", "fatal: "))]
    last = (errors or lines or [f"exit code {completed.returncode}"])[-1].strip()
    return last.removeprefix("ERROR: ").removeprefix("Error: ").removeprefix("fatal: ")


def captured(command: list[str], directory: Path, env: Mapping[str, str]) -> Completed:
    """Run a command without input, and return its exit code and output; exit code 127 where there is no such program.

    Args:
        command: Program and arguments.
        directory: Working directory.
        env: Environment variables.
    """
    try:
        return subprocess.run(
            command,
            cwd=directory,
            env=env,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # file names of any encoding, as Python itself has them
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{error.filename}: not found")
