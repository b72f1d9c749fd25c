"""dvc.yaml: the stages, parameters and code dependencies that it lists, checked against the code."""

import ast
import builtins
from functools import cache
from pathlib import Path

import pytest
import yaml

from vitprune.config.params import load_params, read_yaml
from vitprune.pipeline import stages
from vitprune.pruning.plan import plan_of

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SETTINGS = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]


def has(params: dict, dotted: str) -> bool:
    *sections, leaf = dotted.split(".")
    for section in sections:
        params = params[section]
    return leaf in params


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.startswith("vitprune/")]


def covers(dep: str, path: str) -> bool:
    return path == dep or (dep.endswith("/") and path.startswith(dep))


def file_of(module: str) -> Path | None:
    """Return the source file of a module of this repository, None for a name that is no module."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def only_defines_exceptions(tree: ast.Module) -> bool:
    """Return whether a module has only constants and exception classes, on which no result depends."""
    exceptions = {
        name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    for node in tree.body:
        match node:
            case ast.Expr(ast.Constant()) | ast.Assign(value=ast.Constant() | ast.Tuple()):
                continue
            case ast.ClassDef(name=name, bases=[ast.Name(id=base)]) if base in exceptions:
                exceptions.add(name)
            case _:
                return False
    return True


@cache
def imports(path: Path) -> frozenset[Path]:
    """Return the files of this package that a file imports, anywhere in it, and the packages around them.

    The package `vitprune` itself only passes on names of its modules, so it is no dependency. This holds as long as the
    modules take nothing but modules and its version from it, which is asserted.
    """
    tree = ast.parse(path.read_text())
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vitprune"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vitprune":
            assert node.level == 0
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name for name in names if file_of(name)}
            assert node.module != "vitprune" or all(map(file_of, names)), f"{path}: import {names} from its module"
            modules.add(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vitprune":
            assert node.attr == "__version__", f"{path}: import {node.attr} from its module"
    parents = {".".join(name.split(".")[:depth]) for name in modules for depth in range(2, name.count(".") + 2)}
    files = {file_of(name) for name in (modules | parents) - {"vitprune"}}
    assert None not in files, f"{path}: imports a module that is not there: {modules}"
    return frozenset(file for file in files if not only_defines_exceptions(ast.parse(file.read_text())))


def closure(stage: str) -> set[str]:
    """Return the files that a stage runs: its module, `stages.py`, which calls it, and all that they import."""
    entry = "report" if stage == "report" else f"{stage}_stage"
    waiting = [file_of(f"vitprune.pipeline.{entry}"), file_of("vitprune.pipeline.stages")]
    reached: set[Path] = set()
    while waiting:
        path = waiting.pop()
        assert path is not None
        if path not in reached:
            reached.add(path)
            waiting += imports(path)
    if stage == "report":
        reached.remove(file_of("vitprune.pipeline.stages"))
    return {path.relative_to(ROOT).as_posix() for path in reached}


def test_stages_equal_the_command_line_in_order():
    assert list(STAGES) == [*stages.STAGES, "report"]
    assert all(stage["cmd"] == f"vitprune {name}" for name, stage in STAGES.items())


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_name_every_parameter_that_a_stage_depends_on(path):
    params = read_yaml(path, "")
    named = {dotted for stage in STAGES.values() for dotted in stage.get("params", [])}
    assert [dotted for dotted in sorted(named) if not has(params, dotted)] == []


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_are_valid(path):
    assert plan_of(load_params(path)).config.cycles >= 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_imports_is_a_dependency_of_it(stage):
    needed = closure(stage)
    assert len(needed) > 5
    assert [path for path in sorted(needed) if not any(covers(dep, path) for dep in code_deps(stage))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_code_dependency_is_imported_by_its_stage(stage):
    needed = closure(stage)
    assert [dep for dep in code_deps(stage) if not any(covers(dep, path) for path in needed)] == []


def test_dependencies_are_found_through_functions_and_packages():
    assert "vitprune/pruning/select.py" in closure("score")
    assert "vitprune/pipeline/project_data.py" in closure("export")
    assert "vitprune/criteria/kl/fisher.py" in closure("prune")
    assert not {path for path in closure("score") if path.startswith("vitprune/pipeline/report/")}
    assert "vitprune/errors.py" not in closure("score")


def test_code_dependencies_exist():
    code = {dep for stage in STAGES for dep in code_deps(stage)}
    assert len(code) > 15
    assert [dep for dep in code if not (ROOT / dep).exists()] == []


def test_a_change_of_the_report_runs_the_report_only():
    report = "vitprune/pipeline/report/page.py"
    assert [stage for stage in STAGES if any(covers(dep, report) for dep in code_deps(stage))] == ["report"]


def test_a_change_of_sparsity_runs_from_mask_on_only():
    again = [name for name, stage in STAGES.items() if {"prune", "prune.sparsity"} & set(stage.get("params", []))]
    assert again[0] == "mask"
    assert not {"dataset", "dense", "calibrate", "score"} & set(again)


@pytest.mark.parametrize("stage", stages.STAGES)  # the report uses scipy
def test_stages_import_packages_that_take_seconds_only_where_they_are_used(stage):
    slow = {"sklearn", "scipy", "pandas", "mlflow", "prefect", "dvc", "onnx", "onnxruntime"}
    for path in closure(stage):
        top = [
            node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {name.split(".")[0] for node in top for name in [getattr(node, "module", None) or node.names[0].name]}
        assert not names & slow, path
