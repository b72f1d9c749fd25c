"""Read the inputs of the report: JSON, CSV, params.yaml and the git commit; a missing file gives None or nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprune.errors import BadInput
from vitprune.runtime.commands import git
from vitprune.runtime.files import read_csv, read_optional_json
from vitprune.runtime.yaml_files import load_yaml

if TYPE_CHECKING:
    import jinja2

# Written by every run, so changes in them do not mean that the code has changed.
_WRITTEN_BY_RUNS = ("metrics", "plots", "dvc.lock")


@dataclass(frozen=True)
class Commit:
    """The git commit of a project, and whether tracked files differed from it."""

    digest: str
    dirty: bool


def read_evaluation(metrics: Path) -> dict[str, Any] | None:
    """Return evaluate.json of a folder of metrics, merged with latency.json; None before the evaluate stage.

    Raises:
        BadInput: a file is unreadable or not a JSON object.
    """
    evaluation = read_optional_json(metrics / "evaluate.json")
    if evaluation is None:
        return None
    for name, measured in (read_optional_json(metrics / "latency.json") or {}).items():
        known = evaluation.get(name, {})
        evaluation[name] = known | measured if isinstance(known, dict) else known
    return evaluation


def read_columns(path: Path) -> dict[str, list[float | None]]:
    """Read a CSV file's numeric columns, an empty cell as None; no columns if there is no such file.

    Raises:
        BadInput: the file is unreadable or not UTF-8 text.
    """
    rows = read_csv(path) if path.exists() else []
    columns = {}
    for name in rows[0] if rows else ():
        try:
            columns[name] = [float(row[name]) if row[name] else None for row in rows]
        except (TypeError, ValueError):
            continue  # a column of text, such as the stage's name
    return columns


def read_params(path: Path) -> dict[str, str]:
    """Read a YAML file as dotted keys and the text of their values; empty if there is no such file.

    Raises:
        BadInput: the file is not a YAML mapping.
    """
    try:
        content = load_yaml(path)
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a mapping of keys to values; correct it")
    return dict(_dotted(content, ""))


def template(name: str) -> "jinja2.Template":
    """Return a template of this package."""
    import jinja2  # a flow reads metrics without it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vitprune.pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def look_up(record: Mapping[str, Any] | None, dotted: str) -> Any:
    """Return the value at a dotted key; None if any part of the key is missing."""
    value: Any = record
    for key in dotted.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def read_commit(project: Path) -> Commit | None:
    """Return the commit checked out in a project; None outside git, without git, or before the first commit."""
    head = git(project, "rev-parse", "--verify", "HEAD")
    if head.returncode:
        return None
    excluded = [f":(exclude){path}" for path in _WRITTEN_BY_RUNS]
    changes = git(project, "status", "--porcelain", "--untracked-files=no", "--", ":/", *excluded)
    return Commit(head.stdout.strip(), dirty=bool(changes.stdout))


def _dotted(content: Mapping[Any, Any], prefix: str) -> list[tuple[str, str]]:
    pairs = []
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            pairs += _dotted(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            pairs.append((f"{prefix}{key}", text))
    return pairs
