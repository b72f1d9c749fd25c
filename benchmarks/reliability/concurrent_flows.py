"""Four concurrent flows on one machine, and the overhead of Prefect, DVC and MLflow compared with plain commands.

Servers (PostgreSQL, Prefect, MLflow) run on loopback. Four runs with different seeds and sparsities start at the same
time, each in its own git worktree, with one DVC cache and one MLflow server. Each must succeed, leave a clean
`dvc status` and pass the audit, and the project itself must not change. Then one project runs twice from scratch on the
same machine: the ten commands of dvc.yaml in sequence, without DVC and Prefect, and by `vitprune run`; the training
time is set by `--minutes`, and both must give identical files. A third run, with all stages cached, measures the fixed
overhead. CPU seconds are those of all processes of the run, without the servers. Both parts are recorded in
benchmarks/results/fleet-notes.json and not measured again, unless a flow failed; delete the file to start over. Writes
benchmarks/results/fleet.json and docs/results/fleet.md.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib import toy_project
from benchmarks.lib.results import RESULTS, Row, Section, arguments, write_results, write_sections
from benchmarks.lib.toy_project import ROOT, STAGES, servers, tamper_worker, tiny_project
from vitprune.orchestration.execution import worktrees
from vitprune.orchestration.execution.processes import process_environment

NOTES = RESULTS / "fleet-notes.json"
MAX_RATIO = 1.10
OTHERS = ({"sparsity": 0.5}, {"sparsity": 0.4}, {"cycles": 1}, {"method": "magnitude", "sparsity": 0.5})
PILOT = 4  # epochs of the pilot run that estimates the time of one epoch


@dataclass(frozen=True)
class Spent:
    """Wall-clock and CPU seconds."""

    wall: float
    cpu: float


def main() -> None:
    """Run four flows concurrently, then one run in three ways, and write the tables."""
    options = arguments(
        __doc__,
        {"minutes": (10.0, "training time of the run with plain commands"), "flows": (4, "number of concurrent flows")},
    )
    toy_project.require_servers()
    minutes, flows = (0.2, 2) if options.quick else (options.minutes, options.flows)
    notes = measured(minutes, flows, options.quick)
    fleet, same = notes["fleet"], notes["ways"]["same"]
    spent = {name: Spent(**one) for name, one in notes["ways"]["spent"].items()}
    successful = sum(not row["errors"] for row in fleet)
    plain, flow, idle = spent["plain commands"], spent["vitprune run"], spent["vitprune run, all cached"]
    ratio = flow.wall / plain.wall
    promised = None if options.quick else ratio <= MAX_RATIO
    rows = [
        Row(
            "concurrent flows that succeed and pass the audit",
            successful,
            f"of {len(fleet)}",
            f"{len(fleet)}",
            successful == len(fleet),
        ),
        Row("identical files", float(same), "all (1) or not (0)", "1", same),
        Row("flow / plain commands", ratio, "x wall", f"<= {MAX_RATIO}", promised),
        Row("fixed cost of orchestration", flow.wall - plain.wall, "s wall"),
        Row("fixed cost of orchestration", flow.cpu - plain.cpu, "s of CPU"),
        Row("a run with all stages cached", idle.wall, "s wall"),
        Row("a run with all stages cached", idle.cpu, "s of CPU"),
    ]
    if not options.quick:
        document(fleet, spent, ratio)
    write_results("fleet", rows, options.quick)


def measured(minutes: float, flows: int, quick: bool) -> dict[str, Any]:
    """Measure both parts, each on new servers; skip parts recorded with the same options."""
    parts = {
        "fleet": (flows, lambda folder, servers: at_once(folder, servers, flows)),
        "ways": (minutes, lambda folder, servers: compared(folder, servers, minutes)),
    }
    recorded = {} if quick or not NOTES.exists() else json.loads(NOTES.read_text())
    results = {}
    for part, (option, measure) in parts.items():
        if recorded.get(part, {}).get("option") == option:
            results[part] = recorded[part]["result"]
            continue
        with tempfile.TemporaryDirectory(prefix="vitprune-fleet-") as name:
            folder = Path(name)
            with servers.serving(folder / "team", {}) as running:
                os.environ |= {key: running.env[key] for key in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
                results[part] = measure(folder, running)
        failed = part == "fleet" and any(row["errors"] for row in results[part])
        if not quick and not failed:
            recorded[part] = {"option": option, "result": results[part]}
            NOTES.write_text(json.dumps(recorded, indent=1))
    return results


def document(fleet: Sequence[dict[str, Any]], spent: dict[str, Spent], ratio: float) -> None:
    """Write the page."""
    runs = [
        [row["run"], f"{row['seconds']:.0f}", row["audit"], "; ".join(row["errors"]) or "succeeded"] for row in fleet
    ]
    ways = [[name, f"{one.wall:.1f}", f"{one.cpu:.1f}"] for name, one in spent.items()]
    sections = [
        Section("Concurrent runs", "Started at the same time.", ["run", "seconds", "audit", "result"], runs),
        Section("One run in two ways", f"Ratio {ratio:.3f}.", ["way", "seconds", "CPU seconds"], ways),
    ]
    write_sections(ROOT / "docs/results/fleet.md", "Concurrent flows and their overhead", __doc__ or "", sections)


def at_once(folder: Path, servers: servers.Servers, number: int) -> list[dict[str, Any]]:
    """Start flows in worktrees of one project at the same time; return the result of each."""
    project = tiny_project.make_of_images(folder / "project")
    before = toy_project.output_of(project, "git", "status", "--porcelain", "--untracked-files=no")
    trees = [worktrees.add(project, f"fleet-{one}", "HEAD") for one in range(number)]
    logs = [folder / f"fleet-{one}.log" for one in range(number)]
    for one, tree in enumerate(trees):
        tiny_project.dvc(tree, "checkout", "-q", "images.dvc")
        change(tree, seed=one, prune=OTHERS[one % len(OTHERS)])
    started = time.time()
    running = [toy_project.flow_of(tree, servers.env, log) for tree, log in zip(trees, logs, strict=True)]
    results = []
    for one, process in enumerate(running):
        code = process.wait()
        results.append({"run": f"seed {one}, {OTHERS[one % len(OTHERS)]}"})
        results[-1] |= {"errors": [] if code == 0 else [logs[one].read_text()[-300:]], "audit": "none"}
    for row, tree, log in zip(results, trees, logs, strict=True):
        row["seconds"] = log.stat().st_mtime - started
        if not row["errors"]:
            row |= checked(tree, log)
    if before != toy_project.output_of(project, "git", "status", "--porcelain", "--untracked-files=no"):
        results[0]["errors"].append("the project itself has changed")
    return results


def checked(tree: Path, log: Path) -> dict[str, Any]:
    """Return the audit result and the errors of a run with exit code 0."""
    status = toy_project.output_of(tree, sys.executable, "-m", "dvc", "status")
    run = re.findall(r"^MLflow: .*, run (\w+)$", log.read_text(), re.M)
    if not run:
        messages = [line for line in log.read_text().splitlines() if line.startswith("MLflow was not reached")]
        return {"audit": "none", "errors": messages or ["MLflow is not mentioned"]}
    code, output = tamper_worker.audited(tree, run=run[-1])
    errors = [] if "up to date" in status else [f"dvc status: {status[:200]}"]
    return {"audit": "PASS" if code == 0 else output[-300:], "errors": errors + ["audit"] * (code != 0)}


def compared(folder: Path, servers: servers.Servers, minutes: float) -> dict[str, Any]:
    """Run one project with plain commands and by the flow; return the times, and whether the files are identical."""
    project = tiny_project.make(folder / "long")
    epochs = epochs_for(project, minutes)
    change(project, dense={"train": {**tiny_project.ONE_EPOCH, "epochs": epochs}})
    tiny_project.commit(project, "Set the training time.")
    plain = folder / "plain"
    subprocess.run(["cp", "-a", project, plain], check=True)
    spent = {"plain commands": timed(lambda: run_commands(plain))}
    for name in ("vitprune run", "vitprune run, all cached"):
        log = folder / "flow.log"
        spent[name] = timed(lambda log=log: wait_for(toy_project.flow_of(project, servers.env, log), log))
        print(json.dumps({name: vars(spent[name])}), flush=True)
    same = toy_project.differing_keys(toy_project.digests(project), toy_project.digests(plain)) == []
    return {"spent": {name: asdict(one) for name, one in spent.items()}, "same": same}


def run_commands(project: Path) -> None:
    """Run the commands of dvc.yaml in sequence."""
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    for stage in STAGES:
        subprocess.run(pipeline[stage]["cmd"], shell=True, cwd=project, env=process_environment(project), check=True)


def epochs_for(project: Path, minutes: float) -> int:
    """Return the number of epochs of `dense` that take so many minutes."""
    stage = ["vitprune", "dataset"], ["vitprune", "dense"]
    seconds = []
    for epochs in (1, 1 + PILOT):
        change(project, dense={"train": {**tiny_project.ONE_EPOCH, "epochs": epochs}})
        for command in stage if epochs == 1 else stage[1:]:
            start = time.monotonic()
            subprocess.run(command, cwd=project, env=process_environment(project), check=True)
        seconds.append(time.monotonic() - start)
    for name in toy_project.OUTPUTS:
        for path in (project / name).glob("*"):
            subprocess.run(["rm", "-rf", path], check=True)
    return max(1, round(minutes * 60 * PILOT / max(0.1, seconds[1] - seconds[0])))


def wait_for(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait for a flow; exit with its log if it failed."""
    if process.wait():
        sys.exit(log.read_text()[-3000:])


def timed(work: Any) -> Spent:
    """Return the time of a call with its child processes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    work()
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    return Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def change(project: Path, **sections: Any) -> None:
    """Change sections of params.yaml."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for name, value in sections.items():
        params[name] = {**params[name], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
