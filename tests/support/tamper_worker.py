"""Edit a recorded project, audit it and restore it: tamper_worker.py PROJECT KEYS EDIT..., one JSON line each."""

import json
import multiprocessing
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from tests.support import preloaded, shared
from tests.support.forgeries import FORGERIES, LISTED, copy_of_the_run
from tests.support.tampering import ATTACKS, EDITS, ONLY_AGAIN, Edit

EVERY_EDIT: dict[str, Edit] = {
    "honest": lambda project: None,
    **EDITS,
    **FORGERIES,
    "M8 a second set of runs with the same keys": copy_of_the_run,
    **{name: edit for name, (edit, _) in LISTED.items()},
    **ATTACKS,
    **ONLY_AGAIN,
}
RERUN = {*ONLY_AGAIN, "F8 a loss lowered in history and plot", "F18 another temperature committed"}


def audited(project: Path, *options: str, run: str = "") -> tuple[int, str]:
    """Audit a run (empty: the newest of a project's own store); return the exit code and the output."""
    words = ["audit", run or newest(project), *(["--project", str(project)] if run else []), *options]
    result = preloaded.run("vitprune.cli", *words, cwd=project)
    return result.returncode, result.stdout + result.stderr


def edited(project: Path, edit: Edit, *options: str) -> tuple[int, str]:
    """Edit a project, audit it and restore it; return the exit code and the output. An edit may return a run's id."""
    original = project.rename(project.with_name(f"{project.name}-original"))
    shutil.copytree(original, project, symlinks=True)
    try:
        run = in_child(edit, project)
        return audited(project, *options, run=run or "")
    finally:
        shutil.rmtree(project)
        original.rename(project)


def in_child(edit: Edit, project: Path) -> str | None:
    """Return what an edit returns; MLflow keeps a database open, which is restored as another file afterwards."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: there.send(edit(project)))
    process.start()
    there.close()
    try:
        result: str | None = here.recv()
    except EOFError:
        raise RuntimeError("the edit failed") from None
    finally:
        process.join()
    return result


def newest(project: Path) -> str:
    """Return the id of the newest flow run in a project's MLflow database."""
    with closing(sqlite3.connect(project / "mlflow.db")) as base:
        rows = base.execute(
            "SELECT runs.run_uuid FROM runs JOIN tags USING (run_uuid) WHERE key = 'vitprune.key'"
            " AND tags.value NOT LIKE '%/%' ORDER BY start_time DESC"
        ).fetchall()
    return str(rows[0][0])


def main() -> None:
    """Carry out the named edits one after the other (`honest`: none); print one JSON line each."""
    project, keys = Path(sys.argv[1]), sys.argv[2]
    shared.folder()  # by this process, not by the forks that edit
    for name in sys.argv[3:]:
        options = ["--all", "--trusted-keys", keys, *(["--rerun"] if name in RERUN else [])]
        code, output = edited(project, EVERY_EDIT[name], *options)
        print(json.dumps({"name": name, "code": code, "lines": output.splitlines()}), flush=True)


if __name__ == "__main__":
    main()
