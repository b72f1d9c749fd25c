"""`vitprune sweep`: check and plan a sweep, run the flow sweep, and print its table."""

import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.orchestration.cli_compress import check_stage_limit, checked_project
from vitprune.orchestration.execution.isolated import IsolatedCallError, call
from vitprune.orchestration.execution.lock_and_repair import STATE, exclusive
from vitprune.orchestration.execution.worktrees import WorktreeError, project_state
from vitprune.orchestration.interrupts import run_interruptibly
from vitprune.orchestration.prefect_setup import prepared_flow
from vitprune.orchestration.tracking.kept_files import adopt
from vitprune.runtime.commands import git
from vitprune.runtime.files import read_json, read_optional_json, write_json
from vitprune.runtime.yaml_files import dump_yaml

STOPPED = "stopped; run again to continue with the remaining runs (training saves a checkpoint first)"


@dataclass(frozen=True)
class SweepOptions:
    """Options of `vitprune sweep`: a sweep file, or methods and targets with commas between them.

    Attributes:
        file: The sweep file; None: `methods` and `targets` are given.
        methods: Names of methods.
        targets: Sparsities or costs, such as 0.5 or macs=0.5.
        against: x-axis of the plot: throughput, macs or params.
        name: Name of the sweep if there is no file.
        jobs: Number of runs at once.
        stage_limit: Seconds after which a stage is killed; None: no limit.
        check: Only check the settings and print the runs.
    """

    file: Path | None
    methods: str | None
    targets: str | None
    against: str
    name: str
    jobs: int
    stage_limit: float | None
    check: bool


def run_sweep(project: Path, options: SweepOptions) -> int:
    """Run the flow sweep of a project.

    Returns:
        Exit code: 0 success, 1 at least one run failed, 130 interrupted.

    Raises:
        BadInput: an option, the sweep file or a run's settings are invalid, or the sweep is active already.
    """
    _check(options)
    project = checked_project(project)
    folder = project / STATE / "sweeps" / (options.file.stem if options.file else options.name)

    def body(interrupted: Callable[[], bool]) -> int:
        with exclusive(folder, activity="sweep"):
            _plan(project, folder, options)
            return 0 if options.check else _run(project, folder, options)

    return run_interruptibly(body, STOPPED)


def remove_worktrees(project: Path, name: str) -> None:
    """Remove the worktrees of a sweep's runs; table, plot, MLflow's records and DVC's cache remain.

    Raises:
        BadInput: there is no such sweep, it is active, or MLflow lacks records of its runs.
    """
    project = checked_project(project)
    folder = project / STATE / "sweeps" / name
    plan = folder / "sweep.json"
    if Path(name).name != name or not plan.is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/sweep.json"))) or "none"
        raise BadInput(f"sweep {name}: not in {project}; its sweeps: {known}")
    with exclusive(folder, activity="sweep"):
        directories = [folder / run["directory"] for run in read_json(plan)["runs"]]
        waiting = [path for directory in directories for path in (directory / STATE / "journal").glob("*.jsonl")]
        if waiting:
            raise BadInput(f"{waiting[0]}: MLflow does not have this run; run vitprune sync first")
        for directory in directories:
            adopt(directory, project)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        git(project, "worktree", "prune")
    print(f"{folder / 'runs'}: removed; a further run of the sweep takes finished stages from DVC's cache")


def _check(options: SweepOptions) -> None:
    if options.jobs < 1:
        raise BadInput(f"--jobs {options.jobs}: must be at least 1")
    check_stage_limit(options.stage_limit)
    if options.file is None and not (options.methods and options.targets):
        raise BadInput("give a sweep FILE, or --methods and --targets")
    if options.file is not None and (options.methods or options.targets):
        raise BadInput("give a sweep FILE or --methods and --targets, not both")
    if Path(options.name).name != options.name or options.name.startswith("."):
        raise BadInput(f"--name {options.name}: not a file name; use letters, digits and hyphens")


def _plan(project: Path, folder: Path, options: SweepOptions) -> None:
    """Check all settings before anything runs, write sweep.json, and print the title and, for --check, the runs."""
    file = options.file
    if file is None:
        file = folder / "sweep.yaml"
        targets = [_target(text.strip()) for text in str(options.targets).split(",")]
        methods = [name.strip() for name in str(options.methods).split(",")]
        file.write_text(dump_yaml({"methods": methods, "targets": targets, "against": options.against}))
    try:
        function = "vitprune.orchestration.torch_calls:plan_sweep"
        plan: dict[str, Any] = call(function, str(file.resolve()), str(project), project=folder)
        prefix = project_state(project).prefix
    except (IsolatedCallError, WorktreeError) as error:
        raise BadInput(str(error)) from None
    for planned in plan["runs"]:
        planned["directory"] = str(Path("runs") / planned["name"] / prefix)
    path = folder / "sweep.json"
    before = read_optional_json(path) or {}
    same = {name: value for name, value in before.items() if name != "key"} == plan
    plan["key"] = before["key"] if same else f"sweep-{uuid.uuid4()}"  # a changed plan is a new MLflow run
    write_json(path, plan)
    print(plan["title"])
    if options.check:
        print("\n".join(planned["name"] for planned in plan["runs"]))


def _target(text: str) -> float | str | dict[str, float | str]:
    """Convert a target of the command line to the form of a sweep file; plan_sweep validates it."""
    cost, _, amount = text.rpartition("=")
    try:
        number: float | str = float(amount)
    except ValueError:
        number = amount
    return {cost: number} if cost else number


def _run(project: Path, folder: Path, options: SweepOptions) -> int:
    sweep, _ = prepared_flow(project, "sweep", folder)
    from prefect.task_runners import ThreadPoolTaskRunner

    out = project / "out/sweeps" / folder.name
    runner: Any = ThreadPoolTaskRunner(max_workers=options.jobs)
    state = sweep.with_options(task_runner=runner)(project, folder, out, options.stage_limit, return_state=True)
    if (out / "sweep.md").is_file():
        _print_table(out)
        print(f"table and plot: {out}")
    if state.is_completed():
        return 0
    print(f"Error: {(state.message or 'the sweep failed').splitlines()[0]}", file=sys.stderr)
    return 1


def _print_table(out: Path) -> None:
    import pyarrow.parquet as pq
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "status", "top-1, %", "speed-up", "Pareto")
    for row in pq.read_table(out / "sweep.parquet").to_pylist():
        finished = row["status"] == "finished"
        speedup = f"{row['throughput'] / row['dense_throughput']:.2f}x" if finished else ""
        top1 = f"{row['top1']:.2f}" if finished else ""
        table.add_row(row["run"], row["status"], top1, speedup, "yes" if row["front"] else "")
    Console().print(table)
