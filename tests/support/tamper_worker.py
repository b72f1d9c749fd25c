"""Tampers with a recorded project, audits it and puts it back: tamper_worker.py PROJECT EDIT..., a JSON line each."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from tests.support.tampering import EDITS, ONLY_AGAIN, Edit


def audited(project: Path, rerun: bool = False, run: str = "") -> tuple[int, str]:
    """Audit a run (empty: the newest of a project's own store) in a child of this process; exit code and output."""
    import vitprune.pipeline.verify  # noqa: F401  in this process, once for all children

    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=_audit, args=(project, rerun, run, told))
    child.start()
    code, said = told.get()
    child.join()
    return code, said


def found(project: Path, edit: Edit, rerun: bool = False) -> tuple[int, str]:
    """Edit a project, audit it, and put everything back; the exit code and what was printed last but one."""
    with tempfile.TemporaryDirectory() as folder:
        whole = shutil.copytree(project, Path(folder) / "whole", symlinks=True)
        try:
            edit(project)
            code, said = audited(project, rerun)
        finally:
            shutil.rmtree(project)
            shutil.copytree(whole, project, symlinks=True)
    return code, said.strip().splitlines()[-2 if len(said.strip().splitlines()) > 1 else -1]


def newest(project: Path) -> str:
    """The id of the newest flow run that a project's MLflow has."""
    with closing(sqlite3.connect(project / "mlflow.db")) as base:
        rows = base.execute(
            "SELECT runs.run_uuid FROM runs JOIN tags USING (run_uuid) WHERE key = 'vitprune.key'"
            " AND tags.value NOT LIKE '%/%' ORDER BY start_time DESC"
        ).fetchall()
    return str(rows[0][0])


def _audit(project: Path, rerun: bool, run: str, told: "multiprocessing.SimpleQueue[tuple[int, str]]") -> None:
    from vitprune.errors import BadInput
    from vitprune.orchestration.cli_audit import audit

    os.chdir(project)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = 1 if audit(run or newest(project), project if run else None, False, rerun) else 0
        except BadInput as error:
            print(error)
            code = 2
    told.put((code, said.getvalue()))


def main() -> None:
    """Carry out the named edits one after the other, or an honest audit for `honest`; a JSON line each."""
    project = Path(sys.argv[1])
    for name in sys.argv[2:]:
        edit = (EDITS | ONLY_AGAIN | {"honest": lambda path: None})[name]
        code, line = found(project, edit, rerun=name in ONLY_AGAIN)
        print(json.dumps({"name": name, "code": code, "line": line}), flush=True)


if __name__ == "__main__":
    main()
