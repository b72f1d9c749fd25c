"""What the audit detects: runs that were tampered with must fail, and honest runs of different methods must pass.

A small project with 240 scanned digits, pruned in two cycles, is recorded in MLflow. Each edit is made on the finished
run, audited by `vitprune audit` and reverted. For "all digests agree", DVC and MLflow have recorded the edited run
again, so only recomputation can detect it; the last edit changes one bit of the weights, which only --rerun detects.
Results are recorded in benchmarks/results/audit-notes.jsonl, so that an interrupted benchmark continues; delete the
file to start over. Writes benchmarks/results/audit.json and docs/results/audit.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib.results import RESULTS, Row, arguments, write_results, write_table
from tests.support import (
    tampering,
    tiny_project,
)

ROOT = Path(__file__).parents[2]
AuditResult = dict[str, Any]  # name, code and line
NOTES = RESULTS / "audit-notes.jsonl"
HEADER = ("run", "audit", "first message")
QUICK = (
    "a mask's units change places, in DVC's cache",
    "top-1 raised in MLflow's database",
    "a pixel changed in an image",
)
HONEST: dict[str, dict[str, Any]] = {
    "channel-taylor, two cycles": {},
    "the same, all stages cached": {},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "dimap, one shot": {"method": "dimap", "sparsity": 0.4, "cycles": 1},
    "lamp, 2 cycles": {"method": "lamp", "sparsity": 0.6},
    "ovit": {"method": "ovit", "sparsity": 0.5},
    "upvits": {"method": "upvits", "kinds": ["residual", "attention", "ffn"], "sparsity": 0.25, "cycles": 1},
    "unit-obs, MACs halved": {"method": "unit-obs", "sparsity": None, "target": {"macs": 0.6}, "cycles": 1},
    "corp": {"method": "corp", "sparsity": {"ffn": 0.5}, "cycles": 1},
    "channel-magnitude, multiples of 8": {"method": "channel-magnitude", "sparsity": {"ffn": 0.5}, "round_to": 8},
}


def main() -> None:
    """Audit the run after every edit and the honest runs; skip recorded results; write the tables."""
    quick = arguments(__doc__).quick
    edits = QUICK if quick else (*tampering.EDITS, *tampering.ONLY_AGAIN)
    honest = list(HONEST)[: 1 if quick else None]
    notes = {} if quick else recorded_results()
    if any(name not in notes for name in (*edits, *honest)):
        with tempfile.TemporaryDirectory(prefix="vitprune-audit-bench-") as folder:
            for row in audits(Path(folder), edits, honest, notes):
                print(json.dumps(row), flush=True)
                notes[row["name"]] = row
                if not quick:
                    with NOTES.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    detected, passed = (sum(notes[name]["code"] == code for name in names) for names, code in ((edits, 1), (honest, 0)))
    rows = [
        Row("edits detected", detected, f"of {len(edits)}", f"{len(edits)}", detected == len(edits)),
        Row("honest runs passed", passed, f"of {len(honest)}", f"{len(honest)}", passed == len(honest)),
    ]
    if not quick:
        cells = [[n, "detected" if notes[n]["code"] == 1 else "MISSED", f"`{notes[n]['line']}`"] for n in edits]
        cells += [[f"honest: {name}", "FAILED" if notes[name]["code"] else "passed", ""] for name in honest]
        write_table(ROOT / "docs/results/audit.md", "What the audit detects", __doc__ or "", HEADER, cells)
    write_results("audit", rows, quick)


def recorded_results() -> dict[str, dict[str, Any]]:
    """Return the results that earlier runs of this benchmark have recorded."""
    lines = NOTES.read_text().splitlines() if NOTES.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def audits(folder: Path, edits: Sequence[str], honest: Sequence[str], notes: Collection[str]) -> Iterator[AuditResult]:
    """Audit one project after each edit, and honest runs, without those in `notes`."""
    first, cached = list(HONEST)[:2]
    project = run_and_record(folder / "project", {})
    yield from tampered(project, [name for name in edits if name not in notes])
    if first not in notes:
        yield from tampered(project, ["honest"], first)
    for number, name in enumerate(honest):
        if name in (first, *notes):
            continue
        if name == cached:
            tiny_project.record(project, "second", cached=True)
            tiny_project.upload(project)
            yield from tampered(project, ["honest"], name)
        else:
            yield from tampered(run_and_record(folder / f"honest-{number}", HONEST[name]), ["honest"], name)


def run_and_record(project: Path, prune: dict[str, Any]) -> Path:
    """Create a project, run its stages and upload the run to MLflow."""
    tiny_project.make_of_images(project)
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["prune"] |= prune
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    if prune:
        tiny_project.commit(project, "Another method.")
    tiny_project.run_stages(project)
    tiny_project.record(project, "first")
    tiny_project.upload(project)
    return project


def tampered(project: Path, names: Sequence[str], called: str = "") -> Iterator[AuditResult]:
    """Apply edits in another process; yield the audit result of each, named after the edit or `called`."""
    if not names:
        return
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.tamper_worker", str(project), *names]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for row in map(json.loads, worker.stdout):
            line = row["line"].replace(f"{project}/", "").replace(str(project), "the project").replace("|", "\\|")
            yield row | {"line": line, "name": called or row["name"]}
    if worker.returncode:
        sys.exit(f"the audits of {project} failed with exit code {worker.returncode}")


if __name__ == "__main__":
    main()
