"""What dvc.lock says a run's files are, and those files from DVC's cache or a remote, each against its digest."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitprune.orchestration.execution.run_stage import environment
from vitprune.runtime.files import md5


@dataclass(frozen=True)
class Named:
    """A file that dvc.lock names: its stage, its path in the project, the MD5 of its bytes."""

    stage: str
    path: str
    md5: str


class Missing(Exception):
    """A file is neither in DVC's cache nor in a remote, or what is there is another one."""


def tree_md5(folder: Path) -> str:
    """Return DVC's name of a folder's content: the MD5 of the list of its files and theirs."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    rows = [{"md5": md5(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    listed = json.dumps(sorted(rows, key=lambda row: row["relpath"]), sort_keys=True)
    return hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir"


def read_lock(path: Path) -> dict[str, Any]:
    """Return the stages of a dvc.lock by name."""
    stages: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    return stages


def pointers(place: Path) -> dict[str, Any]:
    """Return what the .dvc files that git sees in a folder name, by their paths, in the form of a dvc.lock's stages."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "*.dvc"]
    listed = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False).stdout.splitlines()
    found = {}
    for name in sorted(listed):
        if (place / name).is_file():
            outs = yaml.safe_load((place / name).read_text(encoding="utf-8")).get("outs", ())
            named = [out | {"path": (Path(name).parent / out["path"]).as_posix()} for out in outs]
            found[name] = {"outs": named}
    return found


def outs(lock: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield stage, path and digest of everything that stages have written; a folder's digest ends with .dir."""
    for stage, entry in lock.items():
        for out in entry.get("outs", ()):
            yield stage, out["path"], out["md5"]


@dataclass(frozen=True)
class Store:
    """DVC's cache of a project, which is only read, and a folder of our own for what a remote has to give."""

    cache: Path
    own: Path

    def path_of(self, digest: str) -> Path:
        """Return where the file with a digest lies; an empty cache of our own where it is not there."""
        place = Path("files/md5") / digest[:2] / digest[2:]
        return self.cache / place if (self.cache / place).is_file() else self.own / place

    def files(self, lock: Mapping[str, Any]) -> Iterator[Named]:
        """Yield every single file that the stages have written, those of folders by the folder's list.

        Raises:
            Missing: a folder's list is not to be had, or is not the one that dvc.lock names.
        """
        for stage, path, digest in outs(lock):
            if not digest.endswith(".dir"):
                yield Named(stage, path, digest)
                continue
            listed = self.path_of(digest)
            if not listed.is_file() or md5(listed) + ".dir" != digest:
                raise Missing(f"{path}: DVC's list of its files, {digest}, is missing or is another one")
            for row in json.loads(listed.read_text(encoding="utf-8")):
                yield Named(stage, f"{path.rstrip('/')}/{row['relpath']}", row["md5"])

    def lacks(self, lock: Mapping[str, Any]) -> list[str]:
        """Return the paths of what neither the cache nor our own folder has, of what DVC caches."""
        try:
            files = list(self.files(lock))
        except Missing as error:
            return [str(error)]
        return [file.path for file in files if is_cached(file.path) and not self.path_of(file.md5).is_file()]


def is_cached(path: str) -> bool:
    """Whether DVC keeps a file; metrics and plots are in git and in MLflow."""
    return not path.startswith(("metrics/", "plots/"))


def cache_of(project: Path) -> Path:
    """Return the folder of a project's DVC cache."""
    done = ask(project, "cache", "dir")
    return (project / done.stdout.strip()).resolve() if done.returncode == 0 else project / ".dvc/cache"


def fetch(tree: Path, own: Path, *what: str) -> str:
    """Fetch into our own folder from the default remote what a tree's dvc.lock names; why DVC failed, if it did."""
    ask(tree, "cache", "dir", "--local", str(own))
    done = ask(tree, "fetch", *what)
    return "" if done.returncode == 0 else why(done)


def take_settings(project: Path, tree: Path) -> None:
    """Give a worktree the remotes that a project has beside its committed settings."""
    local = project / ".dvc/config.local"
    if local.is_file() and (tree / ".dvc").is_dir():
        shutil.copyfile(local, tree / ".dvc/config.local")


def ask(where: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run DVC; without -q, which hides why it fails."""
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(
        command, cwd=where, env=environment(where), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def why(done: "subprocess.CompletedProcess[str]") -> str:
    """Return DVC's reason for a failure, one line."""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Having any troubles?")]
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (said or lines or [f"exit code {done.returncode}"])[-1].strip()
