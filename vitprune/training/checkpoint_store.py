"""Checkpoints of work in progress: whole or not there, checked before they are taken up, the last few kept."""

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from vitprune.errors import BadInput
from vitprune.models.io import read_weights, write_weights
from vitprune.runtime.files import read_json, sha256, write_json

INDEX, STATE, TENSORS = "index.json", "state.json", "tensors.safetensors"
PACKAGES = ("accelerate", "numpy", "safetensors", "timm", "torch")
RESERVED_BYTES = 64 << 20  # bytes that stay free on a disk, for what else is written


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written: its directory, its plain values, and its digest."""

    directory: Path
    facts: dict[str, Any]
    sha256: str

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return read_weights(self.directory / TENSORS)


class CheckpointStore:
    """The checkpoints of one piece of work in a directory, numbered; only what has its key is taken up again."""

    def __init__(self, directory: Path, key: str, keep: int = 2):
        self._directory, self._key, self._keep = directory, key, keep

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that is whole and of this work; of every later one it is told why it is not taken."""
        for entry in reversed(self._entries()):
            try:
                return self._read(entry)
            except BadInput as error:
                print(f"{error}; not taken up", file=sys.stderr)
        return None

    def latest_unverified(self) -> Checkpoint:
        """The last checkpoint, which another process has just written or checked."""
        entry = self._entries()[-1]
        return Checkpoint(entry, read_json(entry / STATE), read_json(entry / INDEX)["sha256"])

    def save(
        self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], more: Callable[[Path], object] | None = None
    ) -> Checkpoint:
        """Write a checkpoint and drop those before the last few; `more` writes further files into its directory.

        It has its name only when all of it is on the disk. Of a plain value, JSON must give the same back.

        Raises:
            OSError: there is no room (ENOSPC), found before a byte is written; the checkpoints before stay.
        """
        self.check_disk_space(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        entries = self._entries()
        target = self._directory / f"{int(entries[-1].name) + 1 if entries else 1:06d}"
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            if more is not None:
                more(partial)
            write_weights(tensors, partial / TENSORS)
            write_json(partial / STATE, facts)
            index = _index(partial, self._key)
            write_json(partial / INDEX, index)
            _on_disk(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(self._directory)
        for entry in entries[: max(0, len(entries) + 1 - self._keep)]:
            shutil.rmtree(entry, ignore_errors=True)
        return Checkpoint(target, dict(facts), index["sha256"])

    def check_disk_space(self, size: int) -> None:
        """Refuse to begin what the disk has no room for, in bytes.

        Raises:
            OSError: ENOSPC.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._directory).free < size + RESERVED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

    def clear(self) -> None:
        """Forget all of it."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _entries(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return sorted(path for path in self._directory.iterdir() if path.name.isdecimal())

    def _read(self, entry: Path) -> Checkpoint:
        index = read_json(entry / INDEX)
        if index.get("key") != self._key:
            raise BadInput(f"{entry}: is a checkpoint of other work")
        if index.get("sha256") != _seal(index):
            raise BadInput(f"{entry / INDEX}: is not as it was written")
        for name, expected in index["files"].items():
            path = entry / name
            if not path.is_file() or sha256(path) != expected:
                raise BadInput(f"{path}: is {'not as it was written' if path.is_file() else 'missing'}")
        return Checkpoint(entry, read_json(entry / STATE), index["sha256"])


def work_key(stage: str, settings: Mapping[str, Any], inputs: Iterable[Path], device: str) -> str:
    """The key of a stage's work, by all that decides its result: settings, files, code, packages, kind of device."""
    files = sorted(file for path in inputs for file in ([path] if path.is_file() else path.rglob("*")))
    where = [platform.python_version(), platform.machine(), device, *(metadata.version(name) for name in PACKAGES)]
    read = {str(file): sha256(file) for file in files if file.is_file()}
    return hash_strings(stage, json.dumps(settings, sort_keys=True, default=str), json.dumps([read, where]), _code())


def hash_strings(*parts: str) -> str:
    """One key of several."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of this package's source."""
    root = Path(__file__).parent
    return hash_strings(*(f"{file.relative_to(root)} {sha256(file)}" for file in sorted(root.rglob("*.py"))))


def _index(directory: Path, key: str) -> dict[str, Any]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    index = {"key": key, "files": {str(path.relative_to(directory)): sha256(path) for path in files}}
    return index | {"sha256": _seal(index)}


def _seal(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([index.get("key"), index.get("files")], sort_keys=True).encode()).hexdigest()


def _on_disk(directory: Path) -> None:
    """Wait until every file of a directory is on the disk, then the directories that name them."""
    below = sorted(directory.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in [*(p for p in below if p.is_file()), *(p for p in below if p.is_dir()), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
