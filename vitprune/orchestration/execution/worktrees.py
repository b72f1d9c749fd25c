"""Git worktrees of a project for runs of their own, which share DVC's cache, and commits made from them."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vitprune.orchestration.audit.collect import git
from vitprune.orchestration.execution.dvc_cache import ask, cache_of, pointers, take_settings, why
from vitprune.orchestration.execution.lock_and_repair import STATE

IDENTITY = {"user.name": "vitprune-retrain", "user.email": "vitprune-retrain@localhost"}


class GitFault(Exception):
    """Git or DVC did not do what a retraining needs; one line."""


def add(project: Path, name: str, revision: str) -> Path:
    """Lay out a revision beside the project's own files, under .vitprune/retrain/NAME; the project in it.

    Raises:
        GitFault: the project is not in git, or has no such revision.
    """
    worktree = project / STATE / "retrain" / name
    prefix = told(project, "rev-parse", "--show-prefix")
    told(project, "worktree", "add", "--detach", "--force", str(worktree), revision)
    place = worktree / prefix
    take_settings(project, place)
    dvc(place, "cache", "dir", "--local", str(cache_of(project)))
    return place


def remove(project: Path, place: Path) -> None:
    """Take a worktree away; what it computed is in DVC's cache."""
    top = told(place, "rev-parse", "--show-toplevel")
    git(project, "worktree", "remove", "--force", top)


def newest(project: Path) -> str:
    """Fetch from the project's git remote, if it has one, and return the newest commit of the branch that it is on.

    Raises:
        GitFault: the remote does not answer.
    """
    upstream = git(project, "rev-parse", "--abbrev-ref", "@{upstream}")
    if upstream.returncode == 0:
        told(project, "fetch", "--quiet")
        return told(project, "rev-parse", "@{upstream}")
    return told(project, "rev-parse", "HEAD")


def take_newest_data(place: Path) -> None:
    """Bring what `dvc import` and `dvc import-url` made up to date, and lay out everything that .dvc files name.

    Raises:
        GitFault: DVC cannot get it.
    """
    for path in pointers(place):
        if yaml.safe_load((place / path).read_text(encoding="utf-8")).get("deps"):
            dvc(place, "update", path)
    names = list(pointers(place))
    if names and dvc_fails(place, "checkout", *names):
        dvc(place, "pull", *names)
    if told(place, "status", "--porcelain", "--untracked-files=no"):  # the run is to begin at a commit that names them
        told(place, *_identity(place), "commit", "--quiet", "--all", "-m", "Take the newest data.")


def data_version(place: Path) -> str:
    """Return the digest of all that decides a run: inputs by their .dvc files, params, pipeline, requirements, code."""
    parts = [f"{name}:{hashlib.sha256((place / name).read_bytes()).hexdigest()}" for name in _deciding(place)]
    parts += [f"{path}:{md5}" for path, md5 in sorted(inputs(place).items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def inputs(place: Path) -> dict[str, str]:
    """Path and digest of everything that .dvc files name."""
    return {out["path"]: str(out["md5"]) for entry in pointers(place).values() for out in entry["outs"]}


def _deciding(place: Path) -> Iterator[str]:
    for name in ("params.yaml", "dvc.yaml", "requirements.txt", "gates.yaml"):
        if (place / name).is_file():
            yield name
    if (place / "vitprune").is_dir():
        yield from sorted(path.relative_to(place).as_posix() for path in (place / "vitprune").rglob("*.py"))


def commit(project: Path, place: Path, branch: str, message: str) -> str:
    """Commit what a run left in a worktree on a branch, whose older commits stay its ancestors; the new commit.

    Raises:
        GitFault: git refuses.
    """
    told(place, "add", "--all", ".")
    tree = told(place, "write-tree")
    old = git(project, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}").stdout.strip()
    base = told(place, "rev-parse", "HEAD")
    parents = [word for parent in dict.fromkeys(filter(None, (old, base))) for word in ("-p", parent)]
    made = told(place, *_identity(place), "commit-tree", tree, *parents, "-m", message)
    told(project, "update-ref", f"refs/heads/{branch}", made, old)
    return made


def provenance(facts: Mapping[str, Any]) -> str:
    """Return facts as the trailer lines of a commit message."""
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def push(place: Path) -> bool:
    """Push outputs and the cache of runs to the default remote; False where the project has none.

    Raises:
        GitFault: the remote does not take them.
    """
    remote = dvc(place, "config", "core.remote", refuse=False)
    if not remote:
        return False
    done = ask(place, "push", "--run-cache")
    if done.returncode:
        raise GitFault(
            f"DVC's remote {remote} does not take the outputs ({why(done)}); everything is kept in {place}, "
            "and a new start computes nothing again"
        )
    return True


def _identity(place: Path) -> list[str]:
    """Options that name a committer where git has none."""
    unset = {key: value for key, value in IDENTITY.items() if git(place, "config", key).returncode}
    return [word for key, value in unset.items() for word in ("-c", f"{key}={value}")]


def told(where: Path, *words: str) -> str:
    """Run git and return what it printed.

    Raises:
        GitFault: it failed.
    """
    done = git(where, *words)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        raise GitFault(f"git {' '.join(words[:2])} failed in {where}: {last}")
    return done.stdout.strip()


def dvc(where: Path, *words: str, refuse: bool = True) -> str:
    """Run DVC and return what it printed.

    Raises:
        GitFault: it failed, and that is not for the caller to see.
    """
    done = ask(where, *words)
    if done.returncode and refuse:
        raise GitFault(f"dvc {words[0]} failed in {where}: {why(done)}")
    return "" if done.returncode else done.stdout.strip()


def dvc_fails(where: Path, *words: str) -> bool:
    """Run DVC and say whether it failed."""
    try:
        dvc(where, *words)
    except GitFault:
        return True
    return False
