"""Directories of a project for its sweep runs and retrainings: git worktrees (or copies) that share its DVC cache."""

import filecmp
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.orchestration.execution.dvc_cache import cache_dir, pointers, use_cache
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.processes import dvc_in_project
from vitprune.runtime.commands import Completed, error_line, git
from vitprune.runtime.files import sha256
from vitprune.runtime.yaml_files import dump_yaml, load_yaml

COMMITTER = {"user.name": "vitprune-retrain", "user.email": "vitprune-retrain@localhost"}
# Written by runs, in addition to the outs of dvc.yaml: never copied from the project into the directory of a run.
WRITTEN_BY_RUNS = (
    *("out", "metrics", "plots", "dvc.lock", "params.yaml", "mlflow.db", "mlruns", "mlartifacts"),
    *(str(STATE), ".dvc/cache", ".dvc/tmp", ".dvc/config.local", ".git", ".venv"),
)
LOCAL_SOURCES = ("folder:", "parquet:", "wds/")


class WorktreeError(Exception):
    """git or DVC failed, or the project cannot be checked out; one line that says what to do."""


@dataclass(frozen=True)
class ProjectState:
    """A project from which sweep runs are checked out.

    Attributes:
        project: Its directory.
        commit: The commit checked out; empty outside git.
        prefix: Path of the project in its repository; empty at the root and outside git.
        deps: Dependencies of its stages, with relative paths.
        outs: Outputs of its stages.
    """

    project: Path
    commit: str
    prefix: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    def check_out(self, folder: Path, params: dict[str, Any]) -> Path:
        """Create or update the directory of one run.

        It has the files of the project's last commit with all later changes, the run's params.yaml, and links to the
        images and weights that git does not track. Outputs that the run has computed are kept.

        Args:
            folder: Root of the worktree.
            params: Content of the run's params.yaml.

        Returns:
            The run's project directory, in `folder`.

        Raises:
            WorktreeError: git fails, or params.yaml names a relative path outside the project or among the outputs.
        """
        target = folder / self.prefix
        self._add_worktree(folder)
        linked = self._input_paths(params)
        current = self._files(self.project)
        for name in set(self._files(target)) - set(current):
            if not (target / name).is_symlink():
                (target / name).unlink()
        for name in current:
            if not any(Path(name).is_relative_to(link) for link in linked):
                _copy(self.project / name, target / name)
        for name in [*linked, *(dep for dep in self.deps if not self._is_output(dep))]:
            _link(self.project / name, target / name)
        use_cache(target, cache_dir(self.project), self.project)
        (target / "params.yaml").write_text(dump_yaml(params), encoding="utf-8")
        return target

    def _add_worktree(self, folder: Path) -> None:
        if not self.commit:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (folder / ".git").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run_git(self.project, "worktree", "prune")
            run_git(self.project, "worktree", "add", "--quiet", "--detach", "--force", str(folder), self.commit)
        elif run_git(folder, "rev-parse", "HEAD") != self.commit:
            run_git(folder, "checkout", "--quiet", "--detach", "--force", self.commit)

    def _is_output(self, name: str) -> bool:
        path = Path(name)
        written = any(path.is_relative_to(output) for output in (*WRITTEN_BY_RUNS, *self.outs))
        return written or "__pycache__" in path.parts

    def _files(self, root: Path) -> list[str]:
        """Return the files that git tracks or would add (all files outside git), without outputs."""
        if not self.commit:
            return list(self._walk(root, ""))
        listed = run_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        return [name for name in listed if name and not self._is_output(name) and os.path.lexists(root / name)]

    def _walk(self, root: Path, below: str) -> Iterator[str]:
        for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
            name = f"{below}{entry.name}"
            if self._is_output(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(root, f"{name}/")
            else:
                yield name

    def _input_paths(self, params: dict[str, Any]) -> list[str]:
        """Return the relative paths of images and weights in params.yaml; a run reads them through links."""
        dataset, paths = params.get("dataset") or {}, {}
        for key in ("source", "eval_source"):
            spec = str(dataset.get(key))
            if spec.startswith(LOCAL_SOURCES):
                paths[f"dataset.{key}"] = spec.rpartition(":")[2] if spec.startswith("wds/") else spec.partition(":")[2]
        if checkpoint := (params.get("dense") or {}).get("checkpoint"):
            paths["dense.checkpoint"] = str(checkpoint)
        relative = {key: os.path.normpath(path) for key, path in paths.items() if not os.path.isabs(path)}
        for key, path in relative.items():
            if path.startswith(".."):
                raise WorktreeError(
                    f"{key}: {path} is outside the project, where a run cannot read it; use an absolute path"
                )
            if self._is_output(path):
                raise WorktreeError(f"{key}: {path} is an output of the runs; move it, or use an absolute path")
        return list(relative.values())


def project_state(project: Path) -> ProjectState:
    """Read the commit, dependencies and outputs of a project.

    Raises:
        WorktreeError: the project is in git and has no commit yet.
    """
    stages = load_yaml(project / "dvc.yaml")["stages"].values()
    deps = dict.fromkeys(dep.rstrip("/") for stage in stages for dep in stage.get("deps", ()))
    outs = tuple(dict.fromkeys(str(out).rstrip("/") for stage in stages for out in stage.get("outs", ())))
    relative = tuple(dep for dep in deps if not os.path.isabs(dep))
    if git(project, "rev-parse", "--is-inside-work-tree").stdout.strip() != "true":
        return ProjectState(project, "", "", relative, outs)
    commit = git(project, "rev-parse", "--quiet", "--verify", "HEAD").stdout.strip()
    if not commit:
        raise WorktreeError(
            f"{project}: has no commit yet, and the runs of a sweep are worktrees; commit the project first"
        )
    return ProjectState(project, commit, run_git(project, "rev-parse", "--show-prefix"), relative, outs)


def add(project: Path, name: str, revision: str) -> Path:
    """Check out a revision for a retraining, in .vitprune/retrain/NAME.

    Returns:
        The project's directory in the new worktree.

    Raises:
        WorktreeError: the project is not in git, or has no such revision.
    """
    worktree = project / STATE / "retrain" / name
    prefix = run_git(project, "rev-parse", "--show-prefix")
    run_git(project, "worktree", "add", "--detach", "--force", str(worktree), revision)
    use_cache(worktree / prefix, cache_dir(project), project)
    return worktree / prefix


def remove(project: Path, directory: Path) -> None:
    """Remove a worktree; its outputs are in the DVC cache."""
    git(project, "worktree", "remove", "--force", run_git(directory, "rev-parse", "--show-toplevel"))


def newest_commit(project: Path) -> str:
    """Fetch from the git remote, if there is one, and return the newest commit of the branch checked out.

    Raises:
        WorktreeError: the remote does not answer.
    """
    upstream = git(project, "rev-parse", "--abbrev-ref", "@{upstream}")
    if upstream.returncode == 0:
        run_git(project, "fetch", "--quiet")
        return run_git(project, "rev-parse", "@{upstream}")
    return run_git(project, "rev-parse", "HEAD")


def update_data(directory: Path) -> None:
    """Update what `dvc import` and `dvc import-url` track, and check out the data of all .dvc files.

    Raises:
        WorktreeError: DVC cannot get the data.
    """
    for path in pointers(directory):
        if load_yaml(directory / path).get("deps"):
            run_dvc(directory, "update", path)
    names = list(pointers(directory))
    if names and dvc_in_project(directory, "checkout", *names).returncode:
        run_dvc(directory, "pull", *names)
    if run_git(directory, "status", "--porcelain", "--untracked-files=no"):  # the run's commit has to name the data
        message = "data: update to the newest version"
        run_git(directory, *_committer(directory), "commit", "--quiet", "--all", "-m", message)


def data_version(directory: Path) -> str:
    """Return one SHA-256 over everything that decides a run: data, params, pipeline, requirements, gates and code."""
    parts = [f"{name}:{sha256(directory / name)}" for name in _deciding_files(directory)]
    parts += [f"{path}:{checksum}" for path, checksum in sorted(tracked_data(directory).items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tracked_data(directory: Path) -> dict[str, str]:
    """Return path and MD5 of everything that .dvc files track."""
    return {out["path"]: str(out["md5"]) for entry in pointers(directory).values() for out in entry["outs"]}


def _deciding_files(directory: Path) -> Iterator[str]:
    for name in ("params.yaml", "dvc.yaml", "requirements.txt", "gates.yaml"):
        if (directory / name).is_file():
            yield name
    if (directory / "vitprune").is_dir():
        yield from sorted(path.relative_to(directory).as_posix() for path in (directory / "vitprune").rglob("*.py"))


def commit_worktree(project: Path, directory: Path, branch: str, message: str, trailers: Mapping[str, Any]) -> str:
    """Commit all files of a worktree on a branch of the project, on top of the branch's last commit.

    Args:
        project: The project whose branch is moved.
        directory: The worktree.
        branch: Created if it does not exist.
        message: Subject of the commit message.
        trailers: Provenance, as trailer lines of the commit message.

    Returns:
        The new commit.

    Raises:
        WorktreeError: git fails.
    """
    run_git(directory, "add", "--all", ".")
    tree = run_git(directory, "write-tree")
    old = git(project, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}").stdout.strip()
    base = run_git(directory, "rev-parse", "HEAD")
    parents = [word for parent in dict.fromkeys(filter(None, (old, base))) for word in ("-p", parent)]
    text = f"{message}\n\n" + "\n".join(f"{name}: {value}" for name, value in trailers.items())
    new = run_git(directory, *_committer(directory), "commit-tree", tree, *parents, "-m", text)
    run_git(project, "update-ref", f"refs/heads/{branch}", new, old)
    return new


def push(directory: Path) -> bool:
    """Push outputs and run cache to the default DVC remote; return False if the project has none.

    Raises:
        WorktreeError: the push fails.
    """
    remote = dvc_in_project(directory, "config", "core.remote").stdout.strip()
    if not remote:
        return False
    completed = dvc_in_project(directory, "push", "--run-cache")
    if completed.returncode:
        raise WorktreeError(
            f"push to DVC remote {remote} failed ({error_line(completed)}); the outputs are in {directory} and in the "
            "DVC cache: run again when the remote answers, finished stages are not recomputed"
        )
    return True


def run_git(directory: Path, *arguments: str) -> str:
    """Run git and return its output.

    Raises:
        WorktreeError: git fails.
    """
    completed = git(directory, *arguments)
    _refuse_failure(completed, f"git {' '.join(arguments[:2])}", directory)
    return completed.stdout.strip("\n")


def run_dvc(directory: Path, *arguments: str) -> None:
    """Run DVC.

    Raises:
        WorktreeError: DVC fails.
    """
    _refuse_failure(dvc_in_project(directory, *arguments), f"dvc {arguments[0]}", directory)


def _refuse_failure(completed: Completed, command: str, directory: Path) -> None:
    if completed.returncode:
        raise WorktreeError(f"{command} failed in {directory}: {error_line(completed)}")


def _committer(directory: Path) -> list[str]:
    """Return the options that name a committer where git has none configured."""
    unset = {key: value for key, value in COMMITTER.items() if git(directory, "config", key).returncode}
    return [word for key, value in unset.items() for word in ("-c", f"{key}={value}")]


def _copy(source: Path, target: Path) -> None:
    """Copy a file unless the target is identical: a rewritten file is a change to DVC."""
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
