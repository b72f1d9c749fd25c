"""The project lock (one flow at a time), and the repair of a project after a killed flow."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from vitprune.errors import BadInput
from vitprune.orchestration.execution.dvc_cache import cache_dir
from vitprune.orchestration.execution.processes import kill_marked
from vitprune.orchestration.execution.run_stage import STAGES

STATE = Path(".vitprune")
LOCKFILE_COPY = STATE / "dvc.lock.complete"
RUN_CACHE_GRACE = 2.0  # seconds in which another DVC process that shares the run cache fills a new folder


class Busy(BadInput):
    """Another process holds the project's lock."""


@contextmanager
def exclusive(project: Path, name: str = "lock", activity: str = "run") -> Iterator[None]:
    """Hold a lock of the project; the kernel releases it when this process ends, also after SIGKILL.

    Args:
        project: The project's directory.
        name: File of the lock, in .vitprune.
        activity: Noun for the error message: "run", "sweep" or "retraining".

    Raises:
        Busy: another process holds the lock.
    """
    path = project / STATE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "just started"
            raise Busy(
                f"{project}: another {activity} is active in this project ({holder}); wait until it ends, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}, since {datetime.now():%H:%M:%S}")
        file.flush()
        yield


def repair(project: Path, log: Callable[[str], None]) -> None:
    """Repair a project after a killed flow, so that DVC accepts it; call it while holding the project's lock.

    Args:
        project: The project's directory.
        log: Called with one line for every repair.
    """
    if count := kill_marked(project):
        log(f"killed {count} processes that an earlier, killed run had left running")
    _release_stale_rwlock(project / ".dvc" / "tmp", log)
    if count := _drop_empty(cache_dir(project) / "runs"):
        log(f"removed {count} empty entries of DVC's run cache, left by a kill or a full disk")
    lock, copy = project / "dvc.lock", project / LOCKFILE_COPY
    if lock.exists() and not is_complete(lock):
        # DVC does not write dvc.lock atomically: a kill leaves it truncated
        if is_complete(copy):
            shutil.copyfile(copy, lock)
            log("dvc.lock was truncated by a kill; restored the last complete one")
        else:
            lock.replace(lock.with_name("dvc.lock.broken"))
            log("dvc.lock was truncated by a kill; renamed to dvc.lock.broken, DVC writes it again from its cache")


def _drop_empty(runs: Path) -> int:
    """Remove empty folders of the run cache, with which every later DVC command fails; return their number."""
    empty = [folder for folder in runs.glob("*/*") if folder.is_dir() and not any(folder.iterdir())]
    old = [folder for folder in empty if time.time() - folder.stat().st_mtime > RUN_CACHE_GRACE]
    for folder in old:
        folder.rmdir()
    return len(old)


def keep_lockfile(project: Path) -> None:
    """Keep a copy of dvc.lock, which DVC does not write atomically."""
    lock, copy = project / "dvc.lock", project / LOCKFILE_COPY
    if is_complete(lock):
        partial = copy.with_suffix(".partial")
        shutil.copyfile(lock, partial)
        os.replace(partial, copy)


def is_complete(lock: Path) -> bool:
    """Whether DVC accepts a dvc.lock and the entry of every pipeline stage has outputs, which DVC writes last."""
    # imported here: a second that most commands of this module's callers do not need
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils import strictyaml

    try:
        content, _ = strictyaml.load(str(lock), COMPILED_LOCKFILE_SCHEMA)
    except (OSError, DvcException, ValueError, TypeError, RecursionError):  # ruamel.yaml raises the last three
        return False
    entries = content.get("stages", {})
    return all(entries[stage].get("outs") for stage in STAGES if stage in entries)


def _release_stale_rwlock(directory: Path, log: Callable[[str], None]) -> None:
    """Remove DVC's rwlock if no running DVC process holds it; DVC keeps a truncated one, and one of a reused PID."""
    path, guard = directory / "rwlock", directory / "rwlock.lock"
    if not path.exists():
        return
    with guard.open("a", encoding="utf-8") as file:  # the lock under which DVC edits the file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        from dvc.rwlock import SCHEMA
        from voluptuous import Invalid

        try:
            content = SCHEMA(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError, Invalid):  # DVC would refuse it for good
            path.unlink()
            log("removed DVC's lock file, damaged by a kill")
            return
        written = path.stat().st_mtime
        holders = [*content["write"].values(), *(holder for read in content["read"].values() for holder in read)]
        if holders and not any(_is_running_dvc(holder["pid"], written) for holder in holders):
            path.unlink()
            log("removed DVC's lock file, left by a killed run")


def _is_running_dvc(pid: int, written: float) -> bool:
    """Whether a PID is that of a DVC process started before `written` (seconds since 1970)."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= written and any("dvc" in word for word in process.cmdline())
    except (psutil.Error, ValueError, OverflowError):  # a number that is no PID
        return False
