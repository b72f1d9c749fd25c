"""The documentation: links, generated numbers and figures, the API reference, and the code blocks, which run."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import vitprune
from benchmarks.docs import import_graph

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
SMALLER = ('_224", pretrained=True)', '_224", depth=2)')  # random weights instead of a download, two blocks for speed
COMMANDS = (
    "benchmarks.docs.readme_table",
    "benchmarks.docs.method_tables",
    "benchmarks.docs.accuracy_figure",
    "benchmarks.docs.results_figures",
    "benchmarks.docs.results_index",
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_point_to_existing_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_and_figures_equal_the_results(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", command, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_the_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(_python(REPOSITORY / "README.md"), {})
    dense = vitprune.count(timm.create_model("deit_tiny_patch16_224", depth=2), _images()).macs
    assert vitprune.count(vitprune.load("pruned"), _images()).macs <= 0.7 * dense


def test_first_prune_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(_python(REPOSITORY / "docs/get_started/first_prune.md"), scope)
    assert scope["plain"].blocks[0].mlp.fc1.out_features == 576  # three quarters of 768
    assert sum(block.mlp.fc1.out_features for block in scope["model"].blocks) == 2 * 576  # the last block's `shrink`


def test_the_guide_to_models_of_other_libraries_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    (code,) = (
        code
        for language, _, code in blocks((REPOSITORY / "docs/guides/other_models.md").read_text(encoding="utf-8"))
        if language == "python"
    )
    exec(code, scope)
    assert type(scope["smaller"]).__name__ == "ViTForImageClassification"
    assert 0.66 < scope["result"].after.macs / scope["result"].before.macs <= 0.7


def test_every_public_name_has_an_entry_in_the_api_reference() -> None:
    page = (REPOSITORY / "docs/reference/api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: vitprune\.(\w+)$", page, re.MULTILINE)) == sorted(vitprune.__all__)


def test_every_decision_is_in_the_list() -> None:
    folder = REPOSITORY / "docs/decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(folder.glob("0*.md")) if f"({path.name})" not in listed] == []


def test_the_packages_are_few_and_their_imports_have_no_cycle() -> None:
    assert import_graph.problem() is None


@pytest.mark.pipeline
def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/tutorial/index.md").read_text(encoding="utf-8")
    directory = tmp_path
    for language, title, code in blocks(page):
        if language == "yaml":
            path = tmp_path / title
            path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), yaml.safe_load(code))))
            continue
        command = [sys.executable, "-W", "ignore", "-c", code] if language == "python" else ["bash", "-euo", "pipefail"]
        script = f"{code}\npwd > {tmp_path}/place\n" if language == "bash" else None
        done = subprocess.run(command, cwd=directory, input=script, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        if language == "bash":
            directory = Path((tmp_path / "place").read_text().strip())
    assert (tmp_path / "project/out/report/report.html").stat().st_size > 10_000
    assert done.stdout.splitlines()[-1] == "PASS"  # the last block is the audit


def _python(page: Path) -> str:
    codes = [code for language, _, code in blocks(page.read_text(encoding="utf-8")) if language == "python"]
    assert SMALLER[0] in codes[0]
    return "\n".join(codes).replace(*SMALLER)


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Yield language, title and code of the executable fenced blocks, in order."""
    for language, title, code in re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page, re.DOTALL | re.MULTILINE
    ):
        if language != "text":
            yield language, title, code


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with some keys of their sections replaced."""
    both = {key: old[key] | value for key, value in new.items() if isinstance(value, dict)}
    return {**old, **new, **both}


def environment() -> dict[str, str]:
    """Return the environment with this interpreter's commands first in PATH, and an author for commits."""
    name = {"GIT_AUTHOR_NAME": "tester", "GIT_AUTHOR_EMAIL": "tester@example.org"}
    name |= {key.replace("AUTHOR", "COMMITTER"): value for key, value in name.items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | name | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def _images() -> torch.Tensor:

    return torch.zeros(1, 3, 224, 224)
