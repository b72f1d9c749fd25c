"""Rerun a run in a clean worktree and compare: bit for bit if both ran on CPU, else within tolerances."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from vitprune.orchestration.audit.collect import CollectedRun
from vitprune.orchestration.execution.dvc_cache import LockedFile, MissingFile, Store, pointers, read_lock, use_cache
from vitprune.orchestration.execution.processes import process_environment, run
from vitprune.runtime.commands import error_line, git
from vitprune.runtime.files import md5, read_json, sha256

CLOCK = ("metrics/latency.json", "out/report/")  # latencies, and the page that shows them
TOP1, COSTS = 1.0, 0.02  # tolerances on other hardware: percentage points; relative, of parameters and MACs


def rerun(collected: CollectedRun) -> Iterator[str]:
    """Rerun all stages from the commit, the recorded params.yaml and the tracked data.

    Yields:
        One message for every output that differs.
    """
    worktree = collected.scratch / "again"
    words = ("--detach", "--force", "--end-of-options", str(worktree), collected.commit)
    added = git(collected.project, "worktree", "add", *words)
    if added.returncode:
        yield f"git: no worktree of commit {collected.commit} ({error_line(added)})"
        return
    project = worktree / collected.prefix
    try:
        yield from _rerun(collected, project)
    except MissingFile as error:
        yield str(error)
    finally:
        git(collected.project, "worktree", "remove", "--force", str(worktree))


def _rerun(collected: CollectedRun, project: Path) -> Iterator[str]:
    if sha256(collected.records / "dvc.yaml") != sha256(project / "dvc.yaml"):
        yield "rerun: dvc.yaml in MLflow is not that of the commit, and only committed commands are run"
        return
    shutil.copyfile(collected.records / "params.yaml", project / "params.yaml")
    (project / "dvc.lock").unlink(missing_ok=True)
    use_cache(project, collected.store.fetched, collected.project)
    _copy_inputs(collected, project)
    store = Store(collected.scratch / "computed", collected.scratch / "computed")
    lines: list[str] = []
    use_cache(project, store.fetched)
    if _dvc_repro(project, lines):
        errors = [line for line in lines if line.startswith(("Error: ", "ERROR: "))] or lines
        yield f"rerun: dvc repro failed ({errors[0] if errors else 'no output'})"
        return
    if _device(collected.tree) == _device(project) == "cpu":
        recorded, again = read_lock(collected.records / "dvc.lock"), read_lock(project / "dvc.lock")
        yield from _compare_bits(list(collected.store.files(recorded)), list(store.files(again)))
    else:
        yield from _compare_numbers(collected.tree, project)


def _compare_bits(recorded: list[LockedFile], again: list[LockedFile]) -> Iterator[str]:
    rerun_md5 = {file.path: file.md5 for file in again}
    for file in recorded:
        if file.path.startswith(CLOCK):
            continue
        checksum = rerun_md5.pop(file.path, None)
        if checksum is None:
            yield f"{file.path}: {file.stage} did not write it in the rerun"
        elif checksum != file.md5:
            yield f"{file.path}: has the MD5 {checksum} in the rerun, {file.md5} in the run"
    yield from (f"{path}: the run did not write it" for path in rerun_md5 if not path.startswith(CLOCK))


def _compare_numbers(recorded: Path, again: Path) -> Iterator[str]:
    """Compare data and calibration set bit for bit, accuracy and costs within the tolerances for other hardware."""
    for name in ("data/manifest.parquet", "data/calibration.parquet"):
        if md5(recorded / name) != md5(again / name):
            yield f"{name}: differs in the rerun"
    before, after = (read_json(tree / "metrics/evaluate.json") for tree in (recorded, again))
    costs = ("params", "macs", "nonzero_params", "nonzero_macs")
    for model in ("dense", "pruned"):
        tolerances = {"top1": TOP1} | {cost: COSTS * before[model][cost] for cost in costs}
        for key, tolerance in tolerances.items():
            if abs(before[model][key] - after[model][key]) > tolerance:
                yield f"metrics/evaluate.json: {model}: {key} is {before[model][key]}, {after[model][key]} in the rerun"


def _device(tree: Path) -> str:
    return str(read_json(tree / "metrics/latency.json").get("environment", {}).get("device", "unknown"))


def _copy_inputs(collected: CollectedRun, project: Path) -> None:
    """Copy the data of .dvc files from the store, with verified checksums; link other inputs to the project's."""
    for pointer, entry in pointers(project).items():
        if collected.store.missing({pointer: entry}):
            collected.store.fetch(project, pointer)
        for file in collected.store.files({pointer: entry}):
            source, target = collected.store.path_of(file.md5), project / file.path
            if not source.is_file() or md5(source) != file.md5:
                raise MissingFile(f"{file.path}: is not in the DVC cache with the MD5 of {pointer}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for entry in read_lock(collected.records / "dvc.lock").values():
        for dep in entry.get("deps", ()):
            original = collected.tree / dep["path"]
            if original.is_symlink() and original.resolve().is_relative_to(collected.project):
                target = project / dep["path"]
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(original.resolve())


def _dvc_repro(project: Path, lines: list[str]) -> int:
    env = process_environment(project)
    if (project / "vitprune/__init__.py").is_file():  # a project that contains the package runs its own copy
        env["PYTHONPATH"] = os.pathsep.join([str(project), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return run([sys.executable, "-m", "dvc", "repro"], project, env, None, lines.append).exit_code
