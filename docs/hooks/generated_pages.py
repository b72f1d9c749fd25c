"""MkDocs hooks: fill the generated parts of reference pages and rewrite links that leave the docs directory.

A page asks for a generated part by a line `<!-- generated: NAME -->`, NAME being a key of GENERATORS.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not

from vitprune import cli  # noqa: E402
from vitprune.config.params import Params  # noqa: E402
from vitprune.pipeline.method_guide import METHOD_GUIDE  # noqa: E402
from vitprune.pruning.methods import METHODS  # noqa: E402

REPOSITORY_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}  # in the repository: in the site


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace a directory in the navigation by its pages, README.md or index.md first."""
    config.nav = [_with_pages(entry) for entry in config.nav or []]
    return config


def _with_pages(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_with_pages(item) for item in entry]
    if isinstance(entry, dict):
        return {title: _with_pages(item) for title, item in entry.items()}
    if not entry.endswith("/"):
        return entry
    pages = sorted(path.name for path in (ROOT / "docs" / entry).glob("*.md"))
    return [entry + name for name in sorted(pages, key=lambda name: name not in ("README.md", "index.md"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository's root."""
    for source, page in REPOSITORY_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill generated parts, then rewrite links to files outside of docs/."""
    filled = re.sub(r"<!-- generated: (\w+) -->", lambda match: "\n".join(GENERATORS[match[1]]()), markdown)
    here = page.file.src_uri
    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", lambda match: _site_link(match, here), filled)


def _site_link(match: re.Match[str], here: str) -> str:
    """Point a relative link at the page of the site; a link to another file of the repository becomes its text."""
    bang, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return match[0]
    sources = {page: source for source, page in REPOSITORY_PAGES.items()}
    inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(here), path))
    if here in sources:
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(sources[here]), path))
    page = REPOSITORY_PAGES.get(inside, inside.removeprefix("docs/") if inside.startswith("docs/") else None)
    if page is None:
        return text if text.startswith("`") else f"{text} (`{inside}`)"
    relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
    if (ROOT / "docs" / page).is_dir():
        relative += "/README.md" if (ROOT / "docs" / page / "README.md").exists() else "/index.md"
    return f"{bang}[{text}]({relative}{'#' + anchor if anchor else ''})"


def command_line() -> Iterator[str]:
    """Describe every command: its help and its arguments and options."""
    root = get_command(vars(cli).get("app") or cli.application())
    context = typer.Context(root, info_name="vitprune")
    yield from _command(root, context, 2)


def _command(command: TyperCommand | TyperGroup, context: typer.Context, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{context.command_path}`\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield f"{_prose(command.help or '')}\n"
    rows = [row for row in (_parameter(each, context) for each in command.get_params(context)) if row]
    if rows:
        yield "| argument or option | meaning | default |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _command(child, typer.Context(child, parent=context, info_name=name), min(level + 1, 4))


def _parameter(parameter: TyperArgument | TyperOption, context: typer.Context) -> str:
    names = (
        [(parameter.metavar or parameter.name or "").upper()]
        if isinstance(parameter, TyperArgument)
        else [*parameter.opts]
    )
    if "--help" in names or parameter.hidden:
        return ""
    default = parameter.get_default(context, call=False)
    shown = "" if default is None or parameter.required or callable(default) else f"`{default}`"
    return f"| {', '.join(f'`{name}`' for name in names)} | {_cell(parameter.help or '')} | {shown} |"


def settings() -> Iterator[str]:
    """Describe every section of params.yaml, from its models."""
    yield "```yaml\n" + (ROOT / "params.yaml").read_text(encoding="utf-8") + "```\n"
    top = [(name, field) for name, field in Params.model_fields.items() if not _models(field)]
    yield "## Top level\n\n" + _fields(top)
    seen: list[type[BaseModel]] = []
    for name, field in Params.model_fields.items():
        for model in _models(field):
            yield from _section(name, model, seen)


def _section(key: str, model: type[BaseModel], seen: list[type[BaseModel]]) -> Iterator[str]:
    if model in seen:
        return
    seen.append(model)
    yield f"## `{key}`\n\n{_prose(model.__doc__ or '')}\n\n{_fields(list(model.model_fields.items()))}"
    for name, field in model.model_fields.items():
        for nested in _models(field):
            yield from _section(f"{key}.{name}", nested, seen)


def _models(annotated: FieldInfo | Any) -> list[type[BaseModel]]:
    """Return the settings models within a field's type."""
    annotation = annotated.annotation if isinstance(annotated, FieldInfo) else annotated
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _fields(fields: list[tuple[str, FieldInfo]]) -> str:
    rows = []
    for name, field in fields:
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {_type(field.annotation)} | {default} | {_cell(field.description or '')} |")
    return "| key | type | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _type(annotation: Any) -> str:
    """Write a type as words: `int or null`, `list of str`, `linear or cubic`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments))
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    return "section" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else annotation.__name__


def _default(value: object) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix(chr(10)).removesuffix('...').strip()}`"


def methods() -> Iterator[str]:
    """List the rows of METHODS, with what each needs and is good for."""
    yield "| method | kinds and scopes | images | time | use | description |\n| --- | --- | --- | --- | --- | --- |"
    for name, method in METHODS.items():
        advice, scopes = METHOD_GUIDE[name], ", ".join(f"{kind}: {scope}" for kind, scope in method.scopes.items())
        cells = (f"`{name}`", scopes, advice.images, advice.time, advice.use, method.about)
        yield f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().replace("\b", "").splitlines())


GENERATORS = {"cli": command_line, "params": settings, "methods": methods}
