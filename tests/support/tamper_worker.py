"""Edit a recorded project, audit it and restore it: tamper_worker.py PROJECT EDIT..., one JSON line each."""

import json
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from tests.support import preloaded
from tests.support.tampering import EDITS, ONLY_AGAIN, Edit


def audited(project: Path, rerun: bool = False, run: str = "") -> tuple[int, str]:
    """Audit a run (empty: the newest of a project's own store); return the exit code and the output."""
    words = [
        "audit",
        run or newest(project),
        *(["--project", str(project)] if run else []),
        *(["--rerun"] if rerun else []),
    ]
    result = preloaded.run("vitprune.cli", *words, cwd=project)
    return result.returncode, result.stdout + result.stderr


def edited(project: Path, edit: Edit, rerun: bool = False) -> tuple[int, str]:
    """Edit a project, audit it and restore it; return the exit code and the last line but one."""
    with tempfile.TemporaryDirectory() as folder:
        backup = shutil.copytree(project, Path(folder) / "backup", symlinks=True)
        try:
            edit(project)
            code, output = audited(project, rerun)
        finally:
            shutil.rmtree(project)
            shutil.copytree(backup, project, symlinks=True)
    lines = output.strip().splitlines()
    return code, lines[-2 if len(lines) > 1 else -1]


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
    project = Path(sys.argv[1])
    for name in sys.argv[2:]:
        edit = (EDITS | ONLY_AGAIN | {"honest": lambda path: None})[name]
        code, line = edited(project, edit, rerun=name in ONLY_AGAIN)
        print(json.dumps({"name": name, "code": code, "line": line}), flush=True)


if __name__ == "__main__":
    main()
