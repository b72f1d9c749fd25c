"""Runs a command in the group of the caller, line by line, and ends whole trees of processes."""

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import psutil  # type: ignore[import-untyped]

# Every process that a flow starts inherits this variable; its value is the project. What is reparented to init after
# its parent died cannot be found by walking a tree, but it still carries the mark.
MARK = "VITPRUNE_FLOW_PROJECT"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), and whether the time limit ended it."""

    exit_code: int
    timed_out: bool


def run(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], limit: float | None, line: Callable[[str], None]
) -> Ended:
    """Run a command in this process's group and hand on each line of its output while it runs.

    `limit` is in seconds; past it the command and all its descendants are killed, as they are when the caller is
    interrupted. A new session would hide the tree from whoever kills the caller's group, so none is made.
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
    finally:
        kill_tree(process.pid)
        exit_code = process.wait()
        reader.join(timeout=5)
        process.stdout.close()
    return Ended(exit_code, timed_out)


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
    """Hand on lines until the output ends; False when the deadline comes first.

    A stray background process may hold the pipe open for ever, so the end of the command counts too.
    """
    while True:
        try:
            text = lines.get(timeout=0.2)
        except queue.Empty:
            if process.poll() is not None:
                return True
        else:
            if text is None:
                return True
            line(text)
        if deadline is not None and time.monotonic() > deadline and process.poll() is None:
            return False


def kill_tree(pid: int) -> None:
    """Kill a process with all its descendants; each is stopped before the walk goes on, so none can fork away."""
    stopped: dict[int, psutil.Process] = {}
    try:
        root = psutil.Process(pid)
        while new := [p for p in [root, *root.children(recursive=True)] if p.pid not in stopped]:
            for process in new:
                stopped[process.pid] = process
                _signal(process.suspend)
    except psutil.NoSuchProcess:
        pass
    for process in stopped.values():
        _signal(process.kill)
    psutil.wait_procs([process for process in stopped.values() if process.pid != pid], timeout=5)


def mark_of(process: psutil.Process) -> str | None:
    """The project whose flow started a process; None where none did, it is another user's or it has just ended."""
    try:
        return cast("str | None", process.environ().get(MARK))
    except (psutil.Error, OSError):
        return None


def kill_marked(project: Path) -> int:
    """Kill what an earlier, dead flow of this project has left running; the number of processes killed.

    Call it only while holding the project's lock: then whatever carries the mark has lost its flow.
    """
    own = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    own |= {p.pid for p in psutil.Process().parents()}
    killed = []
    for process in psutil.process_iter():
        if process.pid not in own and mark_of(process) == str(project):
            _signal(process.kill)
            killed.append(process)
    psutil.wait_procs(killed, timeout=5)
    return len(killed)


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()
