"""Read dvc.lock and .dvc files, and resolve their files in the DVC cache or remote, with verified checksums."""

import configparser
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.orchestration.execution.processes import dvc_in_project
from vitprune.runtime.commands import error_line, git
from vitprune.runtime.files import md5
from vitprune.runtime.untrusted import md5_digest, path_inside
from vitprune.runtime.yaml_files import load_yaml

ATTESTATION = "attestation.jsonl.dvc"  # points to the last run's statements, which no stage reads


@dataclass(frozen=True)
class LockedFile:
    """A file named by dvc.lock or a .dvc file: its stage (or .dvc file), its path in the project, its MD5."""

    stage: str
    path: str
    md5: str


class MissingFile(Exception):
    """A file is neither in the DVC cache nor in a remote, or has another checksum there."""


def tree_md5(folder: Path) -> str:
    """Return DVC's checksum of a folder: the MD5 of the sorted list of its files and their MD5s, with suffix .dir."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    rows = [{"md5": md5(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    listed = json.dumps(sorted(rows, key=lambda row: row["relpath"]), sort_keys=True)
    return hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir"


def read_lock(path: Path) -> dict[str, Any]:
    """Return the stages of a dvc.lock by name; paths and digests are checked.

    Raises:
        BadInput: the file is not a dvc.lock, or has a path outside of the project.
    """
    content = load_yaml(path)
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict):
        raise BadInput(f"{path}: is not a dvc.lock; restore it from git")
    return {str(stage): _checked(entry, path.parent, f"dvc.lock: {stage}") for stage, entry in stages.items()}


def _checked(entry: Any, root: Path, source: str) -> dict[str, Any]:
    """Return an entry of dvc.lock or a .dvc file whose outputs are inside of the project."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key, []), list) for key in ("deps", "outs")):
        raise BadInput(f"{source}: is not an entry of DVC; restore the file from git")
    for out in [*entry.get("outs", ()), *entry.get("deps", ())]:
        if not isinstance(out, dict) or not isinstance(out.get("path"), str):
            raise BadInput(f"{source}: has an entry without a path; restore the file from git")
        if "md5" in out:
            md5_digest(out["md5"], source)
    for out in entry.get("outs", ()):
        path_inside(root, out["path"].rstrip("/"), source)
        md5_digest(out.get("md5"), source)
    for dep in entry.get("deps", ()):
        if not Path(dep["path"]).is_absolute():  # images elsewhere are only read
            path_inside(root, dep["path"].rstrip("/"), source)
    return entry


def pointers(directory: Path) -> dict[str, Any]:
    """Return the content of all .dvc files in a directory that git does not ignore, in the form of dvc.lock's stages.

    Args:
        directory: A project's directory.

    Returns:
        {"images.dvc": {"outs": [{"path": "images", "md5": ...}]}}, with paths relative to `directory`.
    """
    listed = git(directory, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.dvc").stdout
    entries = {}
    for name in sorted(filter(None, listed.split("\0"))):
        if (directory / name).is_file() and name != ATTESTATION:
            entry = load_yaml(directory / name)
            outs = _checked(entry, (directory / name).parent, name).get("outs", ())
            paths = [out | {"path": (Path(name).parent / out["path"]).as_posix()} for out in outs]
            entries[name] = {"outs": paths}
    return entries


@dataclass(frozen=True)
class Store:
    """A project's DVC cache (read only), and a local folder for files fetched from the remote."""

    cache: Path
    fetched: Path

    def path_of(self, checksum: str) -> Path:
        """Return the path of the file with a checksum: in the cache, else in the folder of fetched files."""
        path = Path("files/md5") / checksum[:2] / checksum[2:]
        return self.cache / path if (self.cache / path).is_file() else self.fetched / path

    def files(self, lock: Mapping[str, Any]) -> Iterator[LockedFile]:
        """Yield every output file of the stages of a lock; folders are expanded by DVC's list of their files.

        Raises:
            MissingFile: the list of a folder's files is missing or has another checksum.
            BadInput: the list has other content, or a path outside of its folder.
        """
        for stage, entry in lock.items():
            for out in entry.get("outs", ()):
                path, checksum = out["path"], out["md5"]
                if not checksum.endswith(".dir"):
                    yield LockedFile(stage, path, checksum)
                    continue
                listed = self.path_of(checksum)
                if not listed.is_file() or md5(listed) + ".dir" != checksum:
                    raise MissingFile(f"{path}: DVC's list of its files, {checksum}, is missing or has another MD5")
                source = f"{stage}: DVC's list {checksum}"
                for relative, digest in _listed_files(listed, source):
                    path_inside(Path(path), relative, source)
                    yield LockedFile(stage, f"{path.rstrip('/')}/{relative}", md5_digest(digest, source))

    def missing(self, lock: Mapping[str, Any]) -> list[str]:
        """Return the paths of cached outputs that are neither in the cache nor among the fetched files."""
        try:
            files = list(self.files(lock))
        except MissingFile as error:
            return [str(error)]
        return [file.path for file in files if is_cached(file.path) and not self.path_of(file.md5).is_file()]

    def fetch(self, tree: Path, *targets: str) -> str:
        """Fetch targets from the default remote of a worktree; return DVC's reason if that fails, else ""."""
        use_cache(tree, self.fetched)
        completed = dvc_in_project(tree, "fetch", *targets)
        return error_line(completed) if completed.returncode else ""


def _listed_files(path: Path, source: str) -> list[tuple[str, str]]:
    """Return the relative paths and the MD5s in DVC's list of a folder."""
    try:
        return [(row["relpath"], row["md5"]) for row in json.loads(path.read_bytes())]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise BadInput(f"{source}: is not a list of files; restore it from the DVC remote") from None


def damaged_output(project: Path, stage: str) -> str:
    """Compare the outputs of a stage with the MD5s of dvc.lock, and return the first difference in one line.

    DVC takes an object of its cache for intact, so a damaged one would become an output again and again.
    """
    store = Store(cache_dir(project), project / ".dvc/tmp")
    for out in read_lock(project / "dvc.lock").get(stage, {}).get("outs", ()):
        path = project / out["path"].rstrip("/")
        actual = tree_md5(path) if path.is_dir() else md5(path) if path.is_file() else ""
        if actual != out["md5"]:
            objects = [store.path_of(out["md5"])]
            with contextlib.suppress(MissingFile):
                objects += [store.path_of(file.md5) for file in store.files({stage: {"outs": [out]}})]
            damaged = [str(x) for x in objects if x.is_file() and x.parent.name + x.name.removesuffix(".dir") != md5(x)]
            remove = " ".join([str(path), *damaged])
            return f"{out['path']}: has another MD5 than in dvc.lock; run `rm -rf {remove}`, then run again"
    return ""


def is_cached(path: str) -> bool:
    """Whether DVC caches a file; metrics and plots are in git and in MLflow."""
    return not path.startswith(("metrics/", "plots/"))


def cache_dir(project: Path) -> Path:
    """Return the directory of a project's DVC cache, as DVC's global, project and local settings name it."""
    config = configparser.RawConfigParser()
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dvc/config"
    config.read([user, project / ".dvc/config", project / ".dvc/config.local"], encoding="utf-8")
    return (project / ".dvc" / config.get("cache", "dir", fallback="cache")).resolve()  # relative to the file


def use_cache(tree: Path, cache: Path, project: Path | None = None) -> None:
    """Write a worktree's .dvc/config.local: the local settings of `project`, such as remotes, and a cache directory."""
    path = tree / ".dvc/config.local"
    config = configparser.RawConfigParser()
    config.read(path if project is None else project / ".dvc/config.local", encoding="utf-8")
    if not config.has_section("cache"):
        config.add_section("cache")
    config.set("cache", "dir", str(cache))
    if path.parent.is_dir():
        with path.open("w", encoding="utf-8") as file:
            config.write(file)
