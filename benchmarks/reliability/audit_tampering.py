"""Forgeries of a run, and the level at which the audit detects each; honest runs of different methods must pass.

A small project with 240 scanned digits, pruned in two cycles, is run, signed and recorded in MLflow. Each edit is
made on the finished run, audited by `vitprune audit --all --trusted-keys` and reverted. The forger may write to
MLflow, DVC and the project, but has no signing key; for names with F and "all digests agree", DVC, the attestation
and MLflow have recorded the edited run again. Columns: *records* is what a comparison of the records detects,
*recomputed* what the repetition of stages without training detects, both without a key; *signed* what is detected if
the run has to be signed; *rerun* is measured for what the others miss. *listed*: an honest user may do the same, so
the audit passes and names it. Results are recorded in benchmarks/results/audit-notes.jsonl, so that an interrupted
benchmark continues; delete the file to start over. Writes benchmarks/results/audit.json and docs/results/audit.md.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib.results import RESULTS, Row, arguments, write_results, write_table
from tests.support import tiny_project
from tests.support.forgeries import LISTED
from tests.support.tamper_worker import EVERY_EDIT, RERUN
from vitprune.orchestration.attestation.signing import SIGNING_KEY
from vitprune.orchestration.audit.records import CHECKS as RECORDS
from vitprune.pipeline.verify import CHECKS as RECOMPUTED

ROOT = Path(__file__).parents[2]
AuditResult = dict[str, Any]  # name, code and lines
OTHER = ("- ", "PASS", "FAIL", "Notes:", "Error: ")
NOTES = RESULTS / "audit-notes.jsonl"
HEADER = ("forgery", "records", "recomputed", "signed", "rerun", "first message")
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
    edits = QUICK if quick else tuple(EVERY_EDIT)[1:]
    honest = list(HONEST)[: 1 if quick else None]
    notes = {} if quick else recorded_results()
    if any(name not in notes for name in (*edits, *honest)):
        with tempfile.TemporaryDirectory(prefix="vitprune-audit-bench-") as folder:
            for row in audits(Path(folder), edits, honest, notes):
                print(json.dumps({**row, "lines": failures(row)[:1]}), flush=True)
                notes[row["name"]] = row
                if not quick:
                    with NOTES.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    detected = sum(notes[name]["code"] == 1 or name in LISTED for name in edits)
    unsigned = sum(bool({"records", "recomputed"} & levels(notes[name])) for name in edits)
    passed = sum(notes[name]["code"] == 0 for name in honest)
    rows = [
        Row(
            "forgeries detected or listed, signed",
            detected,
            f"of {len(edits)}",
            f"{len(edits)}",
            detected == len(edits),
        ),
        Row("forgeries detected without a key or a rerun", unsigned, f"of {len(edits)}", "-", None),
        Row("honest runs passed", passed, f"of {len(honest)}", f"{len(honest)}", passed == len(honest)),
    ]
    if not quick:
        cells = [table_row(notes[name]) for name in edits]
        cells += [[f"honest: {name}", *["FAILED" if notes[name]["code"] else "passed"] * 3, "", ""] for name in honest]
        write_table(ROOT / "docs/results/audit.md", "What the audit detects", __doc__ or "", HEADER, cells)
    write_results("audit", rows, quick)


def failures(result: AuditResult) -> list[str]:
    """Return the lines of an audit that name a difference."""
    ends = (": ok", ": see below")
    lines = [line for line in result["lines"] if not line.endswith(ends) and not line.startswith(OTHER)]
    return [re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w-]+", "TEMP", line) for line in lines]


def levels(result: AuditResult) -> set[str]:
    """Return the levels at which an edit was detected."""
    checks = {line.split(": ")[0] for line in failures(result)}
    groups = {"records": RECORDS, "recomputed": RECOMPUTED, "signed": {"signature"}, "rerun": {"rerun"}}
    return {level for level, names in groups.items() if checks & set(names)}


def table_row(result: AuditResult) -> list[str]:
    """Return the cells of an edit: what each level detects; what an earlier one detects, a later one does, too."""
    name, reached = result["name"], levels(result)
    first = next((line for line in failures(result) if not line.startswith("signature")), "")
    if name in LISTED:
        first = next(line for line in result["lines"] if LISTED[name][1] in line).removeprefix("- ")
        return [name, *["listed"] * 3, "", f"`{first}`"]
    records, recomputed = "records" in reached, bool({"records", "recomputed"} & reached)
    signed = bool({"records", "recomputed", "signed"} & reached)
    words = ["detected" if level else "-" for level in (records, recomputed, signed)]
    again = "detected" if "rerun" in reached or recomputed else "MISSED" if name in RERUN else ""
    return [name, *words, again, f"`{first or failures(result)[0]}`" if failures(result) else "MISSED"]


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
            record(project, "second", cached=True)
            yield from tampered(project, ["honest"], name)
        else:
            yield from tampered(run_and_record(folder / f"honest-{number}", HONEST[name]), ["honest"], name)


def run_and_record(project: Path, prune: dict[str, Any]) -> Path:
    """Create a project, run its stages, sign and upload the run to MLflow."""
    tiny_project.make_of_images(project)
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["prune"] |= prune
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    if prune:
        tiny_project.commit(project, "Another method.")
    tiny_project.run_stages(project)
    record(project, "first")
    return project


def record(project: Path, name: str, cached: bool = False) -> None:
    """Record and upload a run that is signed with the key beside the project."""
    key = project.parent / "key"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    os.environ[SIGNING_KEY] = str(key)
    tiny_project.record(project, name, cached)
    del os.environ[SIGNING_KEY]  # a forger has none
    tiny_project.upload(project)


def tampered(project: Path, names: Sequence[str], called: str = "") -> Iterator[AuditResult]:
    """Apply edits in another process; yield the audit result of each, named after the edit or `called`."""
    if not names:
        return
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.support.tamper_worker",
        str(project),
        str(project.parent / "key.pub"),
        *names,
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for row in map(json.loads, worker.stdout):
            lines = [line.replace(f"{project}/", "").replace(str(project), "the project") for line in row["lines"]]
            yield row | {"lines": [line.replace("|", "\\|") for line in lines], "name": called or row["name"]}
    if worker.returncode:
        sys.exit(f"the audits of {project} failed with exit code {worker.returncode}")


if __name__ == "__main__":
    main()
