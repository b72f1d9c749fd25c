"""Names in vitprune/: a file stem, a public class and a public function mean one thing in the whole package."""

import ast
from collections import defaultdict
from pathlib import Path

from vitprune.orchestration.execution.run_stage import STAGES

PACKAGE = Path(__file__).parents[1] / "vitprune"
FILES = sorted(PACKAGE.rglob("*.py"))
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Names that several modules define on purpose:
SHARED = {
    "main",  # the entry point of a command
    "run",  # the entry point of a stage, and of processes
    *STAGES,  # a stage, its command, its section of the report, its check and the library function that it calls
    "check",  # a command and the library function that it calls
    "import_scores",  # a stage of projects that start from published scores
    # defined by each module of architectures/, and called as MODULE.NAME
    *("groups", "merge_heads", "uniform_args"),
    # what a check of pipeline/verify.py recomputes and the report shows
    *("images", "calibration", "curves", "cycles", "evaluation", "losses", "sparsity"),
}


def public_names() -> dict[str, list[str]]:
    """Map each public class and function defined at module level to the files that define it."""
    names = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
                names[node.name].append(str(path.relative_to(PACKAGE)))
    return names


def test_no_file_stem_occurs_twice() -> None:
    stems = [path.stem for path in FILES if path.stem != "__init__"]
    assert sorted(stem for stem in set(stems) if stems.count(stem) > 1) == []


def test_a_public_name_is_defined_once() -> None:
    names = public_names().items()
    assert {name: files for name, files in names if len(files) > 1 and name not in SHARED} == {}


def test_the_package_has_at_most_16_entries() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 16, sorted(entries)
