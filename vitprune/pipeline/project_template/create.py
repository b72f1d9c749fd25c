"""Create a project directory: git, DVC, the pipeline and its settings."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from vitprune import data
from vitprune.config.params import load_params
from vitprune.errors import BadInput
from vitprune.pipeline.project_template import new_params, remotes, shipped_recipes
from vitprune.runtime.commands import Completed, dvc, error_line, git
from vitprune.runtime.yaml_files import dump_yaml

HERE = Path(__file__).parent
REQUIREMENTS = "requirements.txt"
FLOWS = ("flows/compress.py", "flows/retrain.py", "flows/sweep.py")
WRITTEN = ("dvc.yaml", "params.yaml", "prefect.yaml", REQUIREMENTS, *FLOWS)
LOCAL = ("folder:", "parquet:", "wds/")


@dataclass(frozen=True)
class Choice:
    """Settings of a new project.

    Attributes:
        source: Image source.
        model: timm model; None: the demo's for digits, else DeiT-Tiny.
        method: Pruning method; None: channel-taylor for digits (the demo), else unit-obs.
        classes: Number of classes; None: that of the source or of the published weights.
        remote: Folder or address of the DVC remote; None for none.
        recipe: Name or file of a recipe, whose settings replace source, model, method and classes; None for none.
    """

    source: str = "digits"
    model: str | None = None
    method: str | None = None
    classes: int | None = None
    remote: str | None = None
    recipe: Path | str | None = None


def create_project(directory: Path, choice: Choice) -> list[str]:
    """Create a project in a new or existing directory, and return the names of the written files.

    Existing files are not overwritten; missing lines are added to existing .gitignore and .dvcignore files.

    Raises:
        BadInput: the directory contains a project, a setting is invalid, or git or DVC is missing or fails.
    """
    root = Path(os.path.abspath(directory))
    _refuse_existing(root)
    _refuse_without("git", shutil.which("git") is not None, "install git")
    _refuse_without("DVC", importlib.util.find_spec("dvc") is not None, "pip install 'vitprune[pipeline]'")
    remote = remotes.located(choice.remote) if choice.remote is not None else None
    if choice.recipe is not None:
        settings, path = load_params(shipped_recipes.recipe_file(str(choice.recipe))), None
        source = settings.dataset.source
        params = dump_yaml(settings.model_dump(mode="json"))
    else:
        source, path, counted = _located(choice.source, root)
        classes = _classes(choice.classes, source, counted)
        method = choice.method or ("channel-taylor" if source == "digits" else "unit-obs")
        params = new_params.render(_shipped("params.yaml"), source, choice.model, method, classes)
    texts = {
        REQUIREMENTS: _requirements(remote),
        ".gitignore": _ignoring(root, "gitignore"),
        ".dvcignore": _ignoring(root, "dvcignore"),
        **{name: _shipped(name) for name in ("prefect.yaml", *FLOWS)},
        "dvc.yaml": _pipeline(_shipped("dvc.yaml"), path),
        "params.yaml": params,
    }
    if not (root / "README.md").exists():
        texts = {"README.md": _readme(root.name, source)} | texts
    root.mkdir(parents=True, exist_ok=True)
    _make_repository(root)
    if remote is not None:
        _name_remote(root, remote)
    _write_all(root, texts)
    return list(texts)


def _refuse_existing(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise BadInput(f"{root}: is a file; give a directory")
    existing = [name for name in WRITTEN if (root / name).exists()]
    if existing:
        raise BadInput(f"{root / existing[0]}: exists, and init does not overwrite files; give another directory")


def _refuse_without(tool: str, present: bool, remedy: str) -> None:
    if not present:
        raise BadInput(f"init: needs {tool}; {remedy}")


def _located(source: str, root: Path) -> tuple[str, str | None, int | None]:
    """Return the source for params.yaml, its path (relative inside the project) if it is local, and its class count."""
    kind = next((prefix for prefix in LOCAL if source.startswith(prefix)), None)
    if kind is None and source != "digits" and not source.startswith(("hfds/", "torch/")):
        raise BadInput(f"--source {source}: unknown; {data.source_hint(source)}")
    if kind is None:
        return source, None, None
    name, _, path = source.removeprefix(kind).rpartition(":") if kind == "wds/" else ("", "", source.removeprefix(kind))
    absolute = Path(os.path.abspath(path))
    classes = data.open_source(f"{kind}{absolute}" if path else source, setting="--source").classes
    local = (absolute.relative_to(root) if absolute.is_relative_to(root) else absolute).as_posix()
    spec = f"{kind}{name}:{local}" if name else f"{kind}{local}"
    return spec, local, None if classes is None else len(classes)


def _classes(given: int | None, source: str, counted: int | None) -> int | None:
    """Return the number of classes of the model, at least two and at least those of the source."""
    if given is not None and counted is not None and given < counted:
        raise BadInput(f"--classes {given}: {source} has {counted} classes; leave the option out")
    classes = given if given is not None else counted
    if classes == 1:
        raise BadInput(f"--classes: {source} has one class, and a classifier needs two; give those of the model")
    return classes


def _shipped(name: str) -> str:
    """Read a file of this repository: from this package in a wheel, from the root in a checkout."""
    packed = HERE / name
    return (packed if packed.exists() else HERE.parents[2] / name).read_text(encoding="utf-8")


def shipped_pipeline() -> dict[str, Any]:
    """Return the stages of vitprune's dvc.yaml."""
    stages: dict[str, Any] = yaml.safe_load(_shipped("dvc.yaml"))["stages"]
    return stages


def _pipeline(text: str, path: str | None) -> str:
    """Return dvc.yaml for a project: stages depend on requirements.txt instead of vitprune's code."""
    pipeline = yaml.safe_load(text)
    for stage in pipeline["stages"].values():
        deps = [dep for dep in stage["deps"] if not dep.startswith("vitprune/")]
        stage["deps"] = deps + [REQUIREMENTS] * (len(deps) < len(stage["deps"]))
    if path is not None:
        pipeline["stages"]["dataset"]["deps"].append(path)
    about = "# The ten stages of vitprune. They run again after a change of requirements.txt.\n"
    return about + dump_yaml(pipeline)


def _ignoring(root: Path, name: str) -> str:
    """Return the text of .gitignore or .dvcignore: the existing lines and the missing ones of the template."""
    wanted = (HERE / "templates" / name).read_text(encoding="utf-8")
    path = root / f".{name}"
    if not path.exists():
        return wanted
    kept = path.read_text(encoding="utf-8")
    missing = [line for line in wanted.splitlines() if line and line not in kept.splitlines()]
    return kept + ("" if kept.endswith("\n") or not kept else "\n") + "".join(f"{line}\n" for line in missing)


def _requirements(remote: str | None) -> str:
    """Return the packages that the project and its remote need."""
    package = f"{_vitprune()}\n"
    scheme = remotes.kind(remote) if remote is not None else None
    return package + (f"dvc[{scheme}]\n" if scheme is not None else "")


def _vitprune() -> str:
    """Return the requirement that installs this vitprune again: a commit or archive, else its version on an index."""
    distribution = importlib.metadata.distribution("vitprune")
    name, origin = "vitprune[pipeline,export]", json.loads(distribution.read_text("direct_url.json") or "{}")
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return f"{name} @ {origin['vcs_info']['vcs']}+{origin['url']}@{commit}"
    if "archive_info" in origin and not origin["url"].startswith("file:"):
        return f"{name} @ {origin['url']}"
    return f"{name}=={distribution.version}"


def _readme(name: str, source: str) -> str:
    template = Template((HERE / "templates" / "README.md").read_text(encoding="utf-8"))
    return template.substitute(name=name, source=source)


def _make_repository(root: Path) -> None:
    """Initialize git and DVC where missing; inside a larger git repository, DVC is initialized for the subdirectory."""
    if not _inside_git(root):
        _check(git(root, "init", "--quiet"), root)
    if (root / ".dvc").is_dir():
        return
    subdirectory = ["--subdir"] if not (root / ".git").exists() else []
    _check(dvc(root, "init", *subdirectory), root)
    _check(dvc(root, "config", "core.analytics", "false"), root)


def _name_remote(root: Path, address: str) -> None:
    """Make an address the default DVC remote, unless it already is; refuse another one."""
    name = dvc(root, "config", "core.remote").stdout.strip()
    configured = dvc(root, "config", f"remote.{name}.url").stdout.strip() if name else ""
    if configured and configured != address:
        raise BadInput(f"{root}: DVC's default remote is {name}, {configured}; leave out --remote to keep it")
    if not configured:
        _check(dvc(root, "remote", "add", "--default", remotes.NAME, address), root)


def _inside_git(root: Path) -> bool:
    """Return whether the directory is inside a git repository that does not ignore it."""
    in_repository = git(root, "rev-parse", "--git-dir").returncode == 0
    return (root / ".git").exists() or (in_repository and git(root, "check-ignore", "-q", ".").returncode != 0)


def _check(completed: Completed, root: Path) -> None:
    if completed.returncode != 0:
        command = " ".join(completed.args[-4:])
        raise BadInput(f"{root}: {command} failed ({error_line(completed)}); correct it and run init again")


def _write_all(root: Path, texts: Mapping[str, str]) -> None:
    """Write every file under a temporary name, check the settings, then rename them, params.yaml last."""
    partial = {name: root / f"{name}.partial" for name in texts}
    try:
        for name, text in texts.items():
            partial[name].parent.mkdir(exist_ok=True)
            partial[name].write_text(text, encoding="utf-8")
        load_params(partial["params.yaml"])
        for name, path in partial.items():
            os.replace(path, root / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
