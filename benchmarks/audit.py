"""What an audit finds: runs that somebody has tampered with, and honest runs of different methods that have to pass.

A small project of 240 scanned digits, pruned in two cycles, is recorded in MLflow; each edit is made on the finished
run, audited by `vitprune-audit` and taken back. Where "all digests agree", DVC and MLflow have recorded the edited run
anew, so that only computing again can tell; the last of them changes one bit of the weights, which --rerun finds.
Writes benchmarks/results/audit.json and docs/results/audit.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from harness import Row, arguments, write_results, write_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tamper_worker  # noqa: E402
import tampering  # noqa: E402
import tiny_project  # noqa: E402

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
    "upvits": {"method": "upvits", "sparsity": {"residual": 0.25, "attention": 0.25, "ffn": 0.25}, "cycles": 1},
    "unit-obs, MACs halved": {"method": "unit-obs", "sparsity": None, "target": {"macs": 0.6}, "cycles": 1},
    "corp": {"method": "corp", "sparsity": {"ffn": 0.5}, "cycles": 1},
    "channel-magnitude, multiples of 8": {"method": "channel-magnitude", "sparsity": {"ffn": 0.5}, "round_to": 8},
}


def main() -> None:
    """Plant every edit, audit honest runs, and write the tables."""
    quick = arguments(__doc__).quick
    edits = QUICK if quick else (*tampering.EDITS, *tampering.ONLY_AGAIN)
    with tempfile.TemporaryDirectory(prefix="vitprune-audit-bench-") as folder:
        project = recorded(Path(folder) / "project", {})
        found = tampered(project, edits)
        honest = {"channel-taylor, two cycles": tampered(project, ("honest",))["honest"]["code"]}
        if not quick:
            honest |= others(project, Path(folder))
    caught, passed = sum(row["code"] == 1 for row in found.values()), sum(code == 0 for code in honest.values())
    rows = [
        Row("edits found", caught, f"of {len(edits)}", f"{len(edits)}", caught == len(edits)),
        Row("honest runs passed", passed, f"of {len(honest)}", f"{len(honest)}", passed == len(honest)),
    ]
    if not quick:
        cells = [[name, "found" if row["code"] == 1 else "MISSED", f"`{row['line']}`"] for name, row in found.items()]
        cells += [[f"honest: {name}", "FAILED" if code else "passed", ""] for name, code in honest.items()]
        about = (__doc__ or "").replace("\n", " ")
        write_table(ROOT / "docs/results/audit.md", "What an audit finds", about, ["run", "audit", "says first"], cells)
    write_results("audit", rows, quick)


def recorded(project: Path, prune: dict[str, Any]) -> Path:
    """Make a project, run its stages and put the run into MLflow."""
    tiny_project.make_of_images(project)
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["prune"] |= prune
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    if prune:
        tiny_project.commit(project, "Another method.")
    tiny_project.run_stages(project)
    tiny_project.record(project, "first")
    tiny_project.put(project)
    return project


def tampered(project: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Carry out edits in a process of its own; what the audit of each said."""
    command = [sys.executable, "-W", "ignore", tamper_worker.__file__, str(project), *names]
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    for row in rows.values():
        row["line"] = row["line"].replace(f"{project}/", "").replace("|", "\\|")
    return rows


def others(project: Path, folder: Path) -> dict[str, int]:
    """The exit codes of the audits of the other honest runs."""
    tiny_project.record(project, "second", cached=True)
    tiny_project.put(project)
    codes = {}
    for number, (name, prune) in enumerate(HONEST.items()):
        if number == 0:
            continue
        own = recorded(folder / f"honest-{number}", prune) if prune else project
        row = tampered(own, ("honest",))["honest"]
        if row["code"]:
            print(f"{name}: {row['line']}")
        codes[name] = row["code"]
    return codes


if __name__ == "__main__":
    main()
