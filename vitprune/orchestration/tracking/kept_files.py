"""Keep the run logs that MLflow has, and find their files again when MLflow's store is lost."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.orchestration.attestation.statements import BUNDLE, LINK
from vitprune.orchestration.execution.dvc_cache import MissingFile, Store, cache_dir, read_lock
from vitprune.orchestration.tracking.journal import RunLog, read_log
from vitprune.runtime.files import place_file, sha256
from vitprune.runtime.untrusted import path_inside

UPLOADED = "uploaded"  # directory of the logs that MLflow has, beside the others
FILES = ("files", "model")  # lists of files in an event


def archive(run_log: RunLog) -> None:
    """Move an uploaded run log to the others, with those of its files that DVC's cache does not have."""
    folder = run_log.path.parent / UPLOADED
    cached = _paths_in_cache(run_log.project, run_log.spool / "dvc.lock")
    for path in sorted(run_log.spool.rglob("*")):
        name = path.relative_to(run_log.spool).as_posix()
        if path.is_file() and not any(sha256(path) == sha256(other) for other in cached.get(name, ())):
            place_file(path, folder / run_log.flow_run_id / name)
    folder.mkdir(exist_ok=True)
    os.replace(run_log.path, folder / run_log.path.name)
    shutil.rmtree(run_log.spool, ignore_errors=True)  # last: until here an interrupted upload can be repeated


def archived(project: Path) -> list[RunLog]:
    """Return the run logs that were uploaded, oldest first."""
    paths = (RunLog(project, "").path.parent / UPLOADED).glob("*.jsonl")
    return [RunLog(project, path.stem) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def restore(run_log: RunLog) -> frozenset[str]:
    """Put an archived run log and its files back to where they are uploaded from; return the paths that are lost.

    A file is taken from the archive, the project or DVC's cache if it has the SHA-256 of the run log.
    """
    folder = run_log.path.parent / UPLOADED
    kept, log = folder / run_log.flow_run_id, folder / run_log.path.name
    cached = _paths_in_cache(run_log.project, kept / "dvc.lock", run_log.project / "dvc.lock")
    lost = set()
    for file in _files(read_log(log)):
        name, target = file["path"], path_inside(run_log.spool, file["path"], str(log))
        candidates = (kept / name, *cached.get(name, ()), run_log.project / name)
        source = next((path for path in candidates if path.is_file() and sha256(path) == file["sha256"]), None)
        if source is None:
            lost.add(name)
        else:
            place_file(source, target, link=source != candidates[-1])  # the project's may be edited in place
    for name in (BUNDLE, LINK):
        if (kept / name).is_file():
            place_file(kept / name, run_log.spool / name)
    os.replace(log, run_log.path)
    return frozenset(lost)


def adopt(worktree: Path, project: Path) -> None:
    """Copy the archived run logs of a worktree that is about to be removed into the project's archive."""
    for run_log in archived(worktree):
        source, target = run_log.path.parent / UPLOADED, replace(run_log, project=project).path.parent / UPLOADED
        for path in (source / run_log.flow_run_id).rglob("*"):
            if path.is_file():
                place_file(path, target / path.relative_to(source))
        place_file(source / run_log.path.name, target / run_log.path.name)


def _files(facts: list[dict[str, Any]]) -> Iterator[Mapping[str, str]]:
    for fact in facts:
        for part in (fact, *fact.get("cycles", ())):
            for name in FILES:
                yield from part.get(name, ())


def _paths_in_cache(project: Path, *locks: Path) -> dict[str, list[Path]]:
    """Return where DVC's cache has the outputs of some versions of dvc.lock, by their paths in the project."""
    store, paths = Store(cache_dir(project), project), dict[str, list[Path]]()
    for lock in locks:
        try:
            files = list(store.files(read_lock(lock)))
        except (OSError, BadInput, MissingFile):  # without an entry in the cache, files are kept or lost
            continue
        for file in files:
            if (path := store.path_of(file.md5)).is_file():
                paths.setdefault(file.path, []).append(path)
    return paths
