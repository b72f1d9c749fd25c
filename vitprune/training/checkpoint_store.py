"""Checkpoint store: numbered, atomic, verified by checksums; the last few are kept."""

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from vitprune.errors import BadInput
from vitprune.models.weights import read_weights, write_weights
from vitprune.runtime.files import PACKAGE, code_digest, read_json, sha256, write_json

INDEX, STATE, TENSORS = "index.json", "state.json", "tensors.safetensors"
PACKAGES = ("accelerate", "numpy", "safetensors", "timm", "torch")
RESERVED_BYTES = 64 << 20  # bytes of a disk that checkpoints leave free


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        directory: Its directory.
        facts: JSON values.
        sha256: Checksum over all files and the key.
    """

    directory: Path
    facts: dict[str, Any]
    sha256: str

    def tensors(self) -> dict[str, Tensor]:
        """Read its tensors by name."""
        return read_weights(self.directory / TENSORS)


class CheckpointStore:
    """Numbered checkpoints in a directory; only those with the same key are loaded.

    Args:
        directory: Directory of the store.
        key: Key of the work, from `work_key`.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, directory: Path, key: str, keep: int = 2):
        self._directory, self._key, self._keep = directory, key, keep

    def latest(self) -> Checkpoint | None:
        """Return the latest valid checkpoint with this key, None if there is none; report skipped ones on stderr."""
        for entry in reversed(self._entries()):
            try:
                return self._read(entry)
            except BadInput as error:
                print(f"{error}; ignored", file=sys.stderr)
        return None

    def latest_unverified(self) -> Checkpoint:
        """Return the latest checkpoint without verification: another process has just written or verified it."""
        entry = self._entries()[-1]
        return Checkpoint(entry, read_json(entry / STATE), read_json(entry / INDEX)["sha256"])

    def save(
        self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], more: Callable[[Path], object] | None = None
    ) -> Checkpoint:
        """Write a checkpoint and delete the oldest ones. The directory is renamed when all files are synced to disk.

        Args:
            facts: Values that survive a JSON round trip.
            tensors: Tensors by name.
            more: Writes further files into the directory that it is given.

        Returns:
            The checkpoint.

        Raises:
            OSError: not enough disk space (ENOSPC), checked before writing; earlier checkpoints are unchanged.
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
            _sync_tree(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(self._directory)
        for entry in entries[: max(0, len(entries) + 1 - self._keep)]:
            shutil.rmtree(entry, ignore_errors=True)
        return Checkpoint(target, dict(facts), index["sha256"])

    def check_disk_space(self, size: int) -> None:
        """Check that the disk has room for `size` bytes.

        Raises:
            OSError: ENOSPC.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._directory).free < size + RESERVED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

    def clear(self) -> None:
        """Delete all checkpoints."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _entries(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return sorted(path for path in self._directory.iterdir() if path.name.isdecimal())

    def _read(self, entry: Path) -> Checkpoint:
        index = read_json(entry / INDEX)
        if index.get("key") != self._key:
            raise BadInput(f"{entry}: checkpoint of another run (different settings, inputs or code)")
        if index.get("sha256") != _index_checksum(index):
            raise BadInput(f"{entry / INDEX}: checksum mismatch")
        for name, expected in index["files"].items():
            path = entry / name
            if not path.is_file() or sha256(path) != expected:
                raise BadInput(f"{path}: {'checksum mismatch' if path.is_file() else 'missing'}")
        return Checkpoint(entry, read_json(entry / STATE), index["sha256"])


def work_key(stage: str, settings: Mapping[str, Any], inputs: Iterable[Path], device: str) -> str:
    """Return the key of a stage's work: a hash of everything that determines its result.

    Args:
        stage: Name of the stage.
        settings: Settings of the stage.
        inputs: Input files and directories, hashed by content.
        device: Device type. Code, package versions and machine type are included too.

    Returns:
        32 hexadecimal digits.
    """
    files = sorted(file for path in inputs for file in ([path] if path.is_file() else path.rglob("*")))
    versions = [metadata.version(name) for name in PACKAGES]
    environment = [platform.python_version(), platform.machine(), device, *versions]
    checksums = {str(file): sha256(file) for file in files if file.is_file()}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hash_strings(stage, text, json.dumps([checksums, environment]), code_digest(PACKAGE))


def hash_strings(*parts: str) -> str:
    """Return the hash of several strings, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _index(directory: Path, key: str) -> dict[str, Any]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    index = {"key": key, "files": {str(path.relative_to(directory)): sha256(path) for path in files}}
    return index | {"sha256": _index_checksum(index)}


def _index_checksum(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([index.get("key"), index.get("files")], sort_keys=True).encode()).hexdigest()


def _sync_tree(directory: Path) -> None:
    """Sync every file of a directory to disk, then the directories that contain them."""
    paths = sorted(directory.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in [*(p for p in paths if p.is_file()), *(p for p in paths if p.is_dir()), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
