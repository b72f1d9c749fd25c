"""A run computed again in a clean worktree, and compared: bit by bit where both ran on CPU, else within tolerances."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitprune.orchestration.audit.collect import Evidence, git
from vitprune.orchestration.execution.dvc_cache import (
    Missing,
    Named,
    Store,
    fetch,
    pointers,
    read_lock,
    take_settings,
)
from vitprune.orchestration.execution.processes import run
from vitprune.orchestration.execution.run_stage import environment
from vitprune.runtime.files import md5

CLOCK = ("metrics/latency.json", "out/report/")  # what a clock has measured, and the page that shows it
TOP1, COSTS = 1.0, 0.02  # percentage points; relative, of parameters and MACs: for sums that round in another order


def rebuild(evidence: Evidence) -> Iterator[str]:
    """Compute all stages again from the commit, the recorded params and the inputs of DVC's store."""
    worktree = evidence.scratch / "again"
    made = git(evidence.project, "worktree", "add", "--detach", "--force", str(worktree), evidence.commit)
    if made.returncode:
        yield f"git: no worktree of commit {evidence.commit} ({made.stderr.strip().splitlines()[-1]})"
        return
    place = worktree / evidence.parent.data.tags.get("vitprune.git_prefix", "")
    try:
        yield from _again(evidence, place)
    except Missing as error:
        yield str(error)
    finally:
        git(evidence.project, "worktree", "remove", "--force", str(worktree))


def _again(evidence: Evidence, place: Path) -> Iterator[str]:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(evidence.records / name, place / name)
    (place / "dvc.lock").unlink(missing_ok=True)
    take_settings(evidence.project, place)
    _take_inputs(evidence, place)
    store = Store(evidence.scratch / "computed", evidence.scratch / "computed")
    lines: list[str] = []
    _run(place, ["cache", "dir", "--local", str(store.own)], lines)
    if _run(place, ["repro"], lines):
        said = [line for line in lines if line.startswith(("Error: ", "ERROR: "))] or lines
        yield f"rerun: dvc repro failed ({said[0] if said else 'no output'})"
        return
    wanted, found = read_lock(evidence.records / "dvc.lock"), read_lock(place / "dvc.lock")
    if _device(evidence.tree) == _device(place) == "cpu":
        yield from _bits(evidence.store, wanted, store, found)
    else:
        yield from _near(evidence.tree, place)


def _bits(store: Store, wanted: Mapping[str, Any], own: Store, found: Mapping[str, Any]) -> Iterator[str]:
    again = {file.path: file for file in own.files(found)}
    for file in store.files(wanted):
        if file.path.startswith(CLOCK):
            continue
        other = again.pop(file.path, None)
        if other is None or other.md5 != file.md5:
            yield _told(file, other)
    yield from (f"{path}: the run did not leave it" for path in again if not path.startswith(CLOCK))


def _told(file: Named, other: Named | None) -> str:
    if other is None:
        return f"{file.path}: {file.stage} did not leave it when it was computed again"
    return f"{file.path}: computed again it has the MD5 {other.md5}, the run's has {file.md5}"


def _near(wanted: Path, found: Path) -> Iterator[str]:
    """Data and calibration to the bit, as no sum is in them; accuracy and costs within what other hardware rounds."""
    for name in ("data/manifest.parquet", "data/calibration.parquet"):
        if md5(wanted / name) != md5(found / name):
            yield f"{name}: computed again it is another file"
    said, own = (json.loads((tree / "metrics/evaluate.json").read_text()) for tree in (wanted, found))
    for model in ("dense", "pruned"):
        if abs(said[model]["top1"] - own[model]["top1"]) > TOP1:
            yield f"metrics/evaluate.json: {model}: top1 is {said[model]['top1']}, computed again {own[model]['top1']}"
        for cost in ("params", "macs", "nonzero_params", "nonzero_macs"):
            if abs(said[model][cost] - own[model][cost]) > COSTS * said[model][cost]:
                yield f"metrics/evaluate.json: {model}: {cost} is {said[model][cost]}, again {own[model][cost]}"


def _device(tree: Path) -> str:
    found = json.loads((tree / "metrics/latency.json").read_text(encoding="utf-8"))
    return str(found.get("environment", {}).get("device", "unknown"))


def _take_inputs(evidence: Evidence, place: Path) -> None:
    """Lay out the inputs: those of .dvc files from DVC's store, each against its digest; others are the project's."""
    for pointer, entry in pointers(place).items():
        if evidence.store.lacks({pointer: entry}):
            fetch(place, evidence.store.own, pointer)
        for file in evidence.store.files({pointer: entry}):
            source, target = evidence.store.path_of(file.md5), place / file.path
            if not source.is_file() or md5(source) != file.md5:
                raise Missing(f"{file.path}: is not in DVC's store as {pointer} names it")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for entry in read_lock(evidence.records / "dvc.lock").values():
        for dep in entry.get("deps", ()):
            original = evidence.tree / dep["path"]
            if original.is_symlink() and original.resolve().is_relative_to(evidence.project):
                target = place / dep["path"]
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(original.resolve())


def _run(place: Path, words: list[str], lines: list[str]) -> int:
    env = environment(place)
    if (place / "vitprune/__init__.py").is_file():  # a project that has the code in it computes with that
        env["PYTHONPATH"] = os.pathsep.join([str(place), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return run([sys.executable, "-m", "dvc", *words], place, env, None, lines.append).exit_code
