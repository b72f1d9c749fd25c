"""Run commands in the process group of the caller, and kill process trees."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import psutil  # type: ignore[import-untyped]

from vitprune.runtime import commands

# Every process that a flow starts inherits this variable; its value is the project. A process whose parent was killed
# is a child of init and in no tree of ours, but its environment still has the variable.
MARK = "VITPRUNE_FLOW_PROJECT"
GRACE = 30.0  # seconds in which an interrupted stage may save a checkpoint
SHELLS = {"sh", "dash", "bash", "zsh", "fish"}


def process_environment(project: Path) -> dict[str, str]:
    """Return the environment variables of a project's stages.

    The programs of this Python environment come first in PATH, output is unbuffered, and no MLflow run is resumed.
    """
    env = {name: value for name, value in os.environ.items() if name not in {"MLFLOW_RUN_ID", "PYTHONHOME"}}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env | {MARK: str(project), "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def dvc_in_project(project: Path, *arguments: str) -> commands.Completed:
    """Run DVC in the environment of a project's stages."""
    return commands.dvc(project, *arguments, env=process_environment(project))


@dataclass(frozen=True)
class CommandResult:
    """Result of a command: exit code (negative: the signal), and whether it was killed at the time limit."""

    exit_code: int
    timed_out: bool


def run(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], limit: float | None, line: Callable[[str], None]
) -> CommandResult:
    """Run a command in the caller's process group and pass on its output line by line while it runs.

    The command and all its descendants are killed at the time limit. When the caller is interrupted, the command of
    DVC's stage gets SIGTERM, and is killed after GRACE. No new session is started: Ctrl-C has to reach the command too.

    Args:
        command: Program and arguments.
        cwd: Working directory.
        env: Environment variables.
        limit: Seconds after which the command is killed; None: no limit.
        line: Called with every line of stdout and stderr.

    Returns:
        Exit code, and whether the limit was reached.
    """
    deadline = None if limit is None else time.monotonic() + limit
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        timed_out = not _follow(process, lines, deadline, line)
    except Exception:
        raise
    except BaseException:  # KeyboardInterrupt, or Prefect's exception for SIGTERM
        _interrupt_stage(process.pid)
        if MARK in env:
            project = Path(env[MARK])
            if process.wait() == -signal.SIGTERM:  # of the whole group: the stage lost DVC, and may save a checkpoint
                kill_after_grace(_marked(project))
            kill_marked(project)  # Ctrl-C may have ended a shell, but not the processes that it had in the background
        raise
    finally:
        kill_tree(process.pid)
        exit_code = process.wait()
        reader.join(timeout=5)
        if not reader.is_alive():  # else closing waits for a background process that keeps the pipe open
            process.stdout.close()
    return CommandResult(exit_code, timed_out)


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for text in stream:
        lines.put(text.rstrip("\n"))
    lines.put(None)


def _follow(
    process: "subprocess.Popen[str]",
    lines: "queue.Queue[str | None]",
    deadline: float | None,
    line: Callable[[str], None],
) -> bool:
    """Pass on lines until the output ends; return False if the deadline is reached first."""
    while True:
        try:
            text = lines.get(timeout=0.2)
        except queue.Empty:
            if process.poll() is not None:  # a background process of the command may keep the pipe open
                return True
        else:
            if text is None:
                return True
            line(text)
        if deadline is not None and time.monotonic() > deadline and process.poll() is None:
            return False


def _interrupt_stage(dvc: int) -> None:
    """Send SIGTERM to the command that a DVC process runs, but not to its children; kill what is left after GRACE."""
    try:
        root = psutil.Process(dvc)
        descendants = root.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in list(_commands(root)) or [root]:
        _signal(process.terminate if process.pid != dvc else lambda: root.send_signal(signal.SIGINT))
    kill_after_grace([root, *descendants])


def kill_after_grace(processes: Sequence[psutil.Process]) -> None:
    """Wait until processes have ended, and kill those that have not after GRACE; their parents get the exit codes."""
    deadline = time.monotonic() + GRACE
    while (running := [p for p in processes if _is_running(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in running:
        kill_tree(process.pid)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _commands(process: psutil.Process) -> Iterator[psutil.Process]:
    """Yield the children of a process, and of a shell among them its children; a child may end meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children():
            yield child
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() in SHELLS:
                    yield from _commands(child)


def kill_tree(pid: int) -> None:
    """Kill a process with all its descendants; each is suspended before its children are listed, so none can fork."""
    stopped: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):  # the root has ended by itself
        root = psutil.Process(pid)
        while new := [p for p in [root, *root.children(recursive=True)] if p.pid not in stopped]:
            for process in new:
                stopped[process.pid] = process
                _signal(process.suspend)
    for process in stopped.values():
        _signal(process.kill)
    psutil.wait_procs([process for process in stopped.values() if process.pid != pid], timeout=5)


def mark_of(process: psutil.Process) -> str | None:
    """Return the project whose flow started a process; None if none did, or the process cannot be read."""
    try:
        return cast("str | None", process.environ().get(MARK))
    except (psutil.Error, OSError):
        return None


def kill_marked(project: Path) -> int:
    """Kill the processes that a killed flow of this project left running, and return their number.

    Call it only while holding the project's lock: then every marked process belongs to a flow that has ended.
    """
    killed = _marked(project)
    for process in killed:
        _signal(process.kill)
    psutil.wait_procs(killed, timeout=5)
    return len(killed)


def _marked(project: Path) -> list[psutil.Process]:
    """Return the processes of this project's flows, without parents and children of this process."""
    relatives = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    relatives |= {p.pid for p in psutil.Process().parents()}
    return [p for p in psutil.process_iter() if p.pid not in relatives and mark_of(p) == str(project)]


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()
