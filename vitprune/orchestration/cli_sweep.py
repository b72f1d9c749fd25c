"""`vitprune-sweep`: methods x targets, each run the flow `compress` in a place of its own, one picture of them all."""

import argparse
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import yaml

from vitprune.orchestration.cli_compress import interrupt, project_of, quiet, refuse, settle
from vitprune.orchestration.execution.lock_and_repair import STATE, Busy, exclusive
from vitprune.orchestration.execution.run_stage import environment

ABOUT = """Run every method at every target, each in a git worktree of its own with the project's DVC cache, and draw
top-1 against what the models cost. What is there already is not computed again; a run that fails does not stop the
others. FILE is YAML: methods (a list, or each with settings of prune of its own), targets (0.5, {macs: 0.5},
{ffn: 0.6, attention: 0.5}), params (laid over params.yaml) and against (throughput, macs or params)."""


def main() -> None:
    """Run `vitprune-sweep`."""
    options = _options()
    project = project_of(options)
    folder = project / STATE / "sweeps" / (options.file.stem if options.file else options.name)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with exclusive(folder):
            _plan(project, folder, options)
            if options.check:
                return
            for note in settle(folder):
                print(note, flush=True)
            sys.exit(_run(project, folder, options))
    except Busy as error:
        refuse(str(error))
    except KeyboardInterrupt:
        print("\nstopped; start again to go on with the runs that are left", file=sys.stderr)
        sys.exit(130)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vitprune-sweep", description=ABOUT)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the sweep; its name is the file's")
    parser.add_argument("--project", type=Path, default=Path("."), help="the project's directory (default: here)")
    parser.add_argument("--methods", help="instead of FILE: names with commas between them")
    parser.add_argument("--targets", help="instead of FILE: 0.5 or macs=0.5, params=12M, ..., with commas between them")
    parser.add_argument("--against", default="throughput", help="instead of FILE: throughput, macs or params")
    parser.add_argument("--name", default="sweep", help="instead of FILE: what the sweep is called (default: sweep)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1, as a clock would have it)")
    parser.add_argument("--stage-limit", type=float, help="seconds after which a stage is killed (default: none)")
    parser.add_argument("--check", action="store_true", help="check the settings, print the runs, and stop")
    options = parser.parse_args()
    if options.jobs < 1:
        refuse(f"--jobs {options.jobs}: must be at least 1")
    if options.stage_limit is not None and not options.stage_limit > 0:
        refuse(f"--stage-limit {options.stage_limit:g}: must be more than 0 seconds")
    if options.file is None and not (options.methods and options.targets):
        refuse("give a sweep's FILE, or --methods and --targets")
    if options.file is not None and (options.methods or options.targets):
        refuse("give a sweep's FILE or --methods and --targets, not both")
    if Path(options.name).name != options.name or options.name.startswith("."):
        refuse(f"--name {options.name}: is no plain name")
    return options


def _plan(project: Path, folder: Path, options: argparse.Namespace) -> None:
    """Check everything before anything runs, in a process of its own, and write sweep.json; the runs go to the user."""
    file = options.file
    if file is None:
        file = folder / "sweep.yaml"
        goals = [_goal(text.strip()) for text in options.targets.split(",")]
        methods = [name.strip() for name in options.methods.split(",")]
        file.write_text(yaml.safe_dump({"methods": methods, "targets": goals, "against": options.against}))
    command = [
        sys.executable,
        "-P",
        "-m",
        "vitprune.cli",
        "sweep-check",
        str(file),
        "--project",
        str(project),
        "--json",
    ]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        refuse((done.stderr.strip().splitlines() or ["?"])[-1].removeprefix("Error: "))
    plan: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    from vitprune.orchestration.execution.places import SweepWorktreeError, origin

    try:
        prefix = origin(project).prefix
    except SweepWorktreeError as error:
        refuse(str(error))
    for run in plan["runs"]:
        run["place"] = str(Path("runs") / run["name"] / prefix)
    path = folder / "sweep.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = {name: value for name, value in before.items() if name != "key"} == plan
    plan["key"] = before["key"] if same else f"sweep-{uuid.uuid4()}"  # another plan is another run of MLflow
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plan, indent=2), encoding="utf-8")
    os.replace(partial, path)
    print(plan["title"])
    if options.check:
        print("\n".join(run["name"] for run in plan["runs"]))


def _goal(text: str) -> float | str | dict[str, float | str]:
    """A target of the command line as it would be in a file; the check says what is wrong with it."""
    cost, _, amount = text.rpartition("=")
    try:
        number: float | str = float(amount)
    except ValueError:
        number = amount
    return {cost: number} if cost else number


def _run(project: Path, folder: Path, options: argparse.Namespace) -> int:
    from prefect.task_runners import ThreadPoolTaskRunner

    from vitprune.orchestration.sweep import sweep

    quiet()
    out = project / "out/sweeps" / folder.name
    runner: Any = ThreadPoolTaskRunner(max_workers=options.jobs)
    state = sweep.with_options(task_runner=runner)(project, folder, out, options.stage_limit, return_state=True)
    if (out / "sweep.md").is_file():
        _table(out)
        print(f"table and picture: {out}")
    if state.is_completed():
        return 0
    print(f"Error: {(state.message or 'the sweep ended').splitlines()[0]}", file=sys.stderr)
    return 1


def _table(out: Path) -> None:
    import pyarrow.parquet as pq
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "", "top-1, %", "speed-up", "front")
    for row in pq.read_table(out / "sweep.parquet").to_pylist():
        done = row["status"] == "finished"
        cells = [f"{row['top1']:.2f}", f"{row['throughput'] / row['dense_throughput']:.2f}x"] if done else ["", ""]
        table.add_row(row["run"], row["status"], *cells, "yes" if row["front"] else "")
    Console().print(table)


if __name__ == "__main__":
    main()
