"""Where a sweep's runs live: a git worktree each, or a copy where there is no git, all with the project's DVC cache."""

import configparser
import filecmp
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitprune.orchestration.execution.lock_and_repair import STATE, cache_dir

# What a run makes itself, beside what dvc.yaml says: the project's own may come from other parameters.
OWN: tuple[str, ...] = ("out", "metrics", "plots", "dvc.lock", "params.yaml", "mlflow.db", "mlruns", "mlartifacts")
OWN += (str(STATE), ".dvc/cache", ".dvc/tmp", ".dvc/config.local", ".git", ".venv")
LOCAL = ("folder:", "parquet:", "wds/")


class SweepWorktreeError(Exception):
    """A project that runs cannot be made from; the line says what to do."""


@dataclass(frozen=True)
class Origin:
    """The project that runs are made from: its last commit and place in the repository, both empty without git.

    `deps` and `outs` are those of its stages.
    """

    project: Path
    commit: str
    prefix: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    def place(self, folder: Path, params: dict[str, Any]) -> Path:
        """Make or bring up to date the place of one run; the run's project directory.

        It is the project's last commit with what has changed since, the run's own params.yaml, and links to the images
        and weights that git does not have. What the run has computed there stays.

        Raises:
            Unfit: git refuses, or params.yaml reads what a place cannot have.
        """
        home = folder / self.prefix
        self._check_out(folder)
        linked = self._read(params)
        there = self._files(self.project)
        for name in set(self._files(home)) - set(there):
            if not (home / name).is_symlink():
                (home / name).unlink()
        for name in there:
            if not any(Path(name).is_relative_to(link) for link in linked):
                _copy(self.project / name, home / name)
        for name in [*linked, *(dep for dep in self.deps if not self._is_made(dep))]:
            _link(self.project / name, home / name)
        _share_cache(self.project, home)
        (home / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return home

    def _check_out(self, folder: Path) -> None:
        if not self.commit:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (folder / ".git").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _git(self.project, "worktree", "prune")
            _git(self.project, "worktree", "add", "--quiet", "--detach", "--force", str(folder), self.commit)
        elif _git(folder, "rev-parse", "HEAD") != self.commit:
            _git(folder, "checkout", "--quiet", "--detach", "--force", self.commit)

    def _is_made(self, name: str) -> bool:
        path = Path(name)
        return any(path.is_relative_to(own) for own in (*OWN, *self.outs)) or "__pycache__" in path.parts

    def _files(self, root: Path) -> list[str]:
        """The files that git has or would take, or all where there is no git, without what runs make."""
        if not self.commit:
            return list(self._walk(root, ""))
        listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        return [name for name in listed if name and not self._is_made(name) and os.path.lexists(root / name)]

    def _walk(self, root: Path, below: str) -> Iterator[str]:
        for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
            name = f"{below}{entry.name}"
            if self._is_made(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(root, f"{name}/")
            else:
                yield name

    def _read(self, params: dict[str, Any]) -> list[str]:
        """The images and weights that params.yaml names by a relative path, which would mean another place to a run."""
        dataset, paths = params.get("dataset") or {}, {}
        for key in ("source", "eval_source"):
            spec = str(dataset.get(key))
            if spec.startswith(LOCAL):
                paths[f"dataset.{key}"] = spec.rpartition(":")[2] if spec.startswith("wds/") else spec.partition(":")[2]
        if checkpoint := (params.get("dense") or {}).get("checkpoint"):
            paths["dense.checkpoint"] = str(checkpoint)
        relative = {key: os.path.normpath(path) for key, path in paths.items() if not os.path.isabs(path)}
        for key, path in relative.items():
            if path.startswith(".."):
                raise SweepWorktreeError(
                    f"{key}: {path} lies outside the project, and a run elsewhere; give an absolute path"
                )
            if self._is_made(path):
                raise SweepWorktreeError(f"{key}: {path} is where a run writes; move it, or give an absolute path")
        return list(relative.values())


def origin(project: Path) -> Origin:
    """Read where a project stands.

    Raises:
        Unfit: it is in git and has no commit yet.
    """
    stages = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    deps = dict.fromkeys(dep.rstrip("/") for stage in stages for dep in stage.get("deps", ()))
    outs = tuple(dict.fromkeys(str(out).rstrip("/") for stage in stages for out in stage.get("outs", ())))
    inside = tuple(dep for dep in deps if not os.path.isabs(dep))
    if _git(project, "rev-parse", "--is-inside-work-tree", check=False) != "true":
        return Origin(project, "", "", inside, outs)
    commit = _git(project, "rev-parse", "--quiet", "--verify", "HEAD", check=False)
    if not commit:
        raise SweepWorktreeError(
            f"{project}: has no commit yet, and a sweep's runs are worktrees of one; commit the project first"
        )
    return Origin(project, commit, _git(project, "rev-parse", "--show-prefix"), inside, outs)


def _copy(source: Path, target: Path) -> None:
    """Copy a file unless the same is there: a file that is written anew looks changed to DVC."""
    if source.is_dir():  # a submodule, or a link to a folder
        _link(source, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
        shutil.copy2(source, target)


def _link(source: Path, target: Path) -> None:
    if source.exists() and not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def _share_cache(project: Path, home: Path) -> None:
    """Let a place use the project's own settings of DVC, and its cache."""
    local = configparser.ConfigParser()
    local.read(project / ".dvc/config.local", encoding="utf-8")
    if not local.has_section("cache"):
        local.add_section("cache")
    local.set("cache", "dir", str(cache_dir(project)))
    with (home / ".dvc/config.local").open("w", encoding="utf-8") as file:
        local.write(file)


def _git(where: Path, *words: str, check: bool = True) -> str:
    answer = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=False)
    if check and answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise SweepWorktreeError(f"{where}: git {words[0]} failed ({last})")
    return "" if answer.returncode else answer.stdout.strip("\n")
