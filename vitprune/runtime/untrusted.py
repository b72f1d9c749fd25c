"""Check names that come from a stranger: paths, digests, commits, numbers and addresses.

dvc.lock, .dvc files, DVC's lists of folders, MLflow's tags and archives are data. A value that is used as a path, as an
argument of a command or in a message passes one of these functions first.
"""

import re
from pathlib import Path, PurePosixPath

from vitprune.errors import BadInput

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")
_USERINFO = re.compile(r"(?<=://)[^\s'\"<>()]*@")  # up to the last @, as a password may hold one
LARGEST = 9999  # of a number
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def path_inside(root: Path, name: object, source: str) -> Path:
    """Resolve a relative path below a folder and refuse one that leaves it.

    Args:
        root: The folder.
        name: The path as the untrusted file gives it.
        source: The file or tag that gives it, for the message.

    Returns:
        `root / name`. Symbolic links in its parents have been followed for the check, the last part has not.

    Raises:
        BadInput: the path is not text, empty, absolute, has `..` or a control character, or a link leads outside.
    """
    if not isinstance(name, str) or not name or _CONTROL.search(name) or "\\" in name:
        raise BadInput(f"{source}: {name!r} is not a path; restore the file from git or DVC")
    parts = PurePosixPath(name).parts
    path = root / name
    if Path(name).is_absolute() or ".." in parts or not parts:
        raise BadInput(f"{source}: path {name!r} is outside of the project; restore the file from git or DVC")
    if not path.parent.resolve().is_relative_to(root.resolve()):
        link = next(parent for parent in reversed(Path(name).parents) if (root / parent).is_symlink())
        raise BadInput(
            f"{source}: path {name!r} is outside of the project: {link} is a symbolic link; make it a folder"
        )
    return path


def md5_digest(text: object, source: str) -> str:
    """Return an MD5 of DVC, 32 hexadecimal digits with or without `.dir`.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise BadInput(f"{source}: {str(text)[:80]!r} is not an MD5 digest; restore the file from git or DVC")
    return text


def commit_id(text: str, source: str) -> str:
    """Return a full commit id of git; anything else, such as an option of git, is refused.

    Raises:
        BadInput: it is none.
    """
    if not _COMMIT.fullmatch(text):
        raise BadInput(f"{source}: {text[:80]!r} is not a commit id; the record was changed")
    return text


def whole_number(text: str, source: str) -> int:
    """Return a number of at least 0, such as that of a cycle.

    Raises:
        BadInput: it is none, or above `LARGEST`.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= LARGEST):
        raise BadInput(f"{source}: {text[:80]!r} is not a number from 0 to {LARGEST}; the record was changed")
    return int(text)


def without_credentials(text: str) -> str:
    """Remove user names and passwords from every address in a text, for consoles, artifacts and messages."""
    return _USERINFO.sub("", text)
