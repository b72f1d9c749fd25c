"""Atomic file writes, JSON and CSV files, and checksums."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput

PACKAGE = Path(__file__).parents[1]  # vitprune
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)


def path_of_user(path: str | os.PathLike[str], name: str) -> Path:
    """Return an argument of the Python API as a path; `check_arguments` has checked its type.

    Raises:
        BadInput: it is empty, or has a NUL.
    """
    if path == "" or "\0" in str(path):
        raise BadInput(f"{name}: {str(path)!r} is not a path")
    return Path(path)


def make_directory(directory: Path) -> None:
    """Create a directory and its parents, if they are missing.

    Raises:
        BadInput: a file is in its place, the name is too long, or there is no permission.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise BadInput(f"{directory}: cannot be made a directory ({error.strerror}); give another path") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on failure.

    Args:
        path: The file to write. Missing parent directories are created.

    Yields:
        The path to write to.

    Raises:
        BadInput: a directory is in the file's place, or the file system is read-only.
        OSError: the disk is full.
    """
    make_directory(path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # do not write through an existing link
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in NOT_WRITABLE or str(error.filename) not in (str(partial), str(path)):
            raise
        raise BadInput(f"{path}: cannot be written ({os.strerror(error.errno)}); give another path") from None
    finally:
        with contextlib.suppress(OSError):  # of a file system that is read-only
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_files(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder next to `path`, for formats of several files.

    On success all files of the folder are moved to the folder of `path`, `path` itself last. The temporary folder is
    deleted in any case.

    Args:
        path: The main file to write. Missing parent directories are created.

    Yields:
        The path to write to; other files are written beside it.

    Raises:
        BadInput: a directory is in the file's place, or the folder cannot be written to.
        OSError: the disk is full.
    """
    make_directory(path.parent)
    if path.is_dir():
        raise BadInput(f"{path}: cannot be written ({os.strerror(errno.EISDIR)}); give another path")
    try:
        temporary = tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise BadInput(f"{path}: cannot be written ({os.strerror(error.errno or 0)}); give another path") from None
    with temporary as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))


def place_file(source: Path, target: Path, link: bool = True) -> None:
    """Hard-link a file, or copy it: to another file system, and if `link` is false. An earlier target is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def read_regular_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: there is no such file, it is a pipe, a device or a folder, or it is larger.
    """
    try:
        status = path.stat()
    except ValueError:  # a NUL in the name
        raise OSError(errno.EINVAL, "not a file name", str(path)) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EINVAL, f"{status.st_size} bytes, the limit is {limit}", str(path))
    with path.open("rb") as file:
        return file.read(limit + 1)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadInput: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; run the stage that writes it first") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); run the stage that writes it again") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error}); run the stage that writes it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a JSON object; run the stage that writes it again")
    return content


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file.

    Raises:
        BadInput: the file is unreadable, not JSON, or not an object.
    """
    return read_json(path) if path.exists() else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Raises:
        ValueError: a line is not JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header line; cells are text.

    Raises:
        BadInput: the file is missing, unreadable or not UTF-8 text.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; run the stage that writes it first") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); run the stage that writes it again") from None
    except (ValueError, csv.Error):
        raise BadInput(f"{path}: not a CSV file; run the stage that writes it again") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically, with the columns in order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row)) or ["epoch"]
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(package: Path) -> str:
    """Return the SHA-256 of a package's Python files: of the sorted lines `SHA-256  path`."""
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    lines = "".join(f"{sha256(package / name)}  {name}\n" for name in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def md5(path: Path) -> str:
    """Return the MD5 checksum of a file in hexadecimal, which DVC uses as the name in its cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
