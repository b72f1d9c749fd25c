"""What the documents show works, and what they point to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_the_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    # without the network: random weights in place of the published ones
    example: dict[str, object] = {}
    exec(code.replace('_224", pretrained=True)', '_224")'), example)
    plain = timm.create_model("local-dir:smaller", pretrained=True)
    assert plain.blocks[0].mlp.fc1.out_features == 576  # three quarters of 768


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    command = [sys.executable, "-m", "benchmarks.docs.readme_table", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_decision_is_in_the_list() -> None:
    folder = REPOSITORY / "docs/decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(folder.glob("0*.md")) if f"({path.name})" not in listed] == []
