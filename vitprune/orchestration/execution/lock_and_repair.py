"""One flow at a time in a project, and the repair of what a killed one left behind."""

import configparser
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from vitprune.orchestration.execution.processes import kill_marked
from vitprune.orchestration.execution.run_stage import STAGES

STATE = Path(".vitprune")
LOCKFILE_COPY = STATE / "dvc.lock.whole"
SETTLED = 2.0  # seconds


class Busy(Exception):
    """Another flow is at work in the project."""


@contextmanager
def exclusive(project: Path, name: str = "lock", what: str = "run") -> Iterator[None]:
    """Hold a lock of the project; the kernel lets it go when this process dies, however it dies.

    Raises:
        Busy: another process holds it; `what` says at what work it is.
    """
    path = project / STATE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "just started"
            raise Busy(f"{project}: another {what} is at work here ({holder}); wait until it ends, or end it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}, since {datetime.now():%H:%M:%S}")
        file.flush()
        yield


def repair(project: Path, tell: Callable[[str], None]) -> None:
    """Bring a project that a killed flow left behind into a state that DVC accepts.

    Call it while holding the project's lock. `tell` gets one line for each thing mended.
    """
    if count := kill_marked(project):
        tell(f"ended {count} processes that an earlier run, killed, had left behind")
    _release_dead(project / ".dvc" / "tmp", tell)
    if count := _drop_empty(cache_dir(project) / "runs"):
        tell(f"removed {count} entries of DVC's cache of runs, cut off by a kill or a full disk")
    lock, copy = project / "dvc.lock", project / LOCKFILE_COPY
    if lock.exists() and not is_whole(lock):
        # DVC writes dvc.lock in place: a kill in that instant leaves half of it
        if is_whole(copy):
            shutil.copyfile(copy, lock)
        else:
            lock.replace(lock.with_name("dvc.lock.broken"))
        tell("dvc.lock was cut off by a kill; took the last whole one")


def cache_dir(project: Path) -> Path:
    """Return the folder of DVC's cache, as the project's settings name it."""
    config = configparser.ConfigParser()
    config.read([project / ".dvc/config", project / ".dvc/config.local"], encoding="utf-8")
    return (project / ".dvc" / config.get("cache", "dir", fallback="cache")).resolve()  # relative to the file


def _drop_empty(runs: Path) -> int:
    """Drop folders of the cache of runs in which nothing is, and over which DVC stumbles for good; their number.

    Another run may share the cache and be about to write there, which takes it an instant: what is new stays.
    """
    empty = [folder for folder in runs.glob("*/*") if folder.is_dir() and not any(folder.iterdir())]
    old = [folder for folder in empty if time.time() - folder.stat().st_mtime > SETTLED]
    for folder in old:
        folder.rmdir()
    return len(old)


def keep_lockfile(project: Path) -> None:
    """Keep a copy of dvc.lock, which DVC does not write atomically."""
    lock, copy = project / "dvc.lock", project / LOCKFILE_COPY
    if is_whole(lock):
        partial = copy.with_suffix(".partial")
        shutil.copyfile(lock, partial)
        os.replace(partial, copy)


def is_whole(lock: Path) -> bool:
    """Whether a dvc.lock can be read and every entry of a stage of ours is complete."""
    try:
        content = yaml.safe_load(lock.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    if not isinstance(content, dict) or "schema" not in content:
        return False
    entries = content.get("stages") or {}
    return all(_entry_is_whole(entries[stage]) for stage in STAGES if stage in entries)


def _entry_is_whole(entry: Any) -> bool:
    if not isinstance(entry, dict) or "cmd" not in entry or not entry.get("outs"):
        return False  # DVC writes the outs last
    files = [*(entry.get("deps") or []), *(entry.get("outs") or [])]
    return all(isinstance(file, dict) and "path" in file and "hash" in file for file in files)


def _release_dead(directory: Path, tell: Callable[[str], None]) -> None:
    """Drop from DVC's rwlock what no live DVC process holds.

    DVC does so itself, except when the file was cut off by a kill, or another process has got the dead one's number.
    """
    path, guard = directory / "rwlock", directory / "rwlock.lock"
    if not path.exists():
        return
    with guard.open("a", encoding="utf-8") as file:  # the guard under which DVC itself edits the file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            path.unlink()
            tell("removed DVC's lock file, cut off by a kill")
            return
        written = path.stat().st_mtime
        holders = [*content.get("write", {}).values(), *(i for r in content.get("read", {}).values() for i in r)]
        if holders and not any(_is_alive(int(holder["pid"]), written) for holder in holders):
            path.unlink()
            tell("removed DVC's lock file, left by a killed run")


def _is_alive(pid: int, written: float) -> bool:
    """Whether a process is the DVC process that took a lock no later than `written` (seconds since 1970)."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= written and any("dvc" in word for word in process.cmdline())
    except psutil.Error:
        return False
