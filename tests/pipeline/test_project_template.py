"""`vitprune init`: written files, refused choices, and a project that works with the installed package only."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from vitprune import data, plan_for
from vitprune.config.params import load_params
from vitprune.errors import BadInput
from vitprune.pipeline.method_guide import METHOD_GUIDE
from vitprune.pipeline.project_template import Choice, create_project, new_params
from vitprune.pipeline.project_template.shipped_recipes import about, recipe_files
from vitprune.pruning.methods import METHODS

pytestmark = pytest.mark.pipeline
REPOSITORY = Path(__file__).parents[2]
INIT = "from vitprune.cli import main; main()"


def git(project: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=True).stdout


def repro(project: Path, *words: str) -> str:
    """Run `dvc repro WORDS...` as a user with an activated environment does."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "dvc", "repro", *words]
    done = subprocess.run(command, cwd=project, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_folder(root: Path, names: str = "ab") -> Path:
    """Write six digits per class as root/CLASS/NUMBER.png."""
    digits = data.open_source("digits")
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in [row for row, result in enumerate(digits.labels) if result == label][:6]:
            (root / name / f"{number}.png").write_bytes(digits.read(digits.ids[number]))
    return root


def test_a_digits_project_equals_the_demo(tmp_path: Path) -> None:
    project = tmp_path / "deep" / "project"
    create_project(project, Choice())
    assert (project / "params.yaml").read_text() == (REPOSITORY / "params.yaml").read_text()
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    for name, stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].items():
        assert stages[name] == stage | {"deps": stages[name]["deps"]}
        assert [dep for dep in stages[name]["deps"] if dep != "requirements.txt"] == [
            dep for dep in stage["deps"] if not dep.startswith("vitprune/")
        ]
        assert stages[name]["deps"].count("requirements.txt") == 1
    assert (project / "requirements.txt").read_text() == "vitprune[pipeline,export]==0.1.0\n"
    for flow in ("compress", "retrain", "sweep"):
        name = f"flows/{flow}.py"
        assert (project / name).read_text() == (REPOSITORY / name).read_text()
    for flow in ("compress", "retrain"):
        assert f"entrypoint: flows/{flow}.py:{flow}\n" in (project / "prefect.yaml").read_text()
    assert "/.venv/" in (project / ".dvcignore").read_text().splitlines()
    assert "analytics = false" in (project / ".dvc/config").read_text()
    assert not list(project.glob("*.partial"))


def test_dvc_runs_the_first_stage_and_git_has_only_metrics(tmp_path: Path) -> None:
    create_project(tmp_path, Choice())
    assert "Running stage 'dataset'" in repro(tmp_path, "dataset")
    assert json.loads((tmp_path / "metrics/dataset.json").read_text())["classes"] == 10
    assert "didn't change, skipping" in repro(tmp_path, "dataset")
    for name in (".vitprune", "out", "mlartifacts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "mlflow.db").touch()
    untracked = git(tmp_path, "status", "--short", "--untracked-files=all").splitlines()
    assert {line[3:] for line in untracked if line.startswith("??")} == {
        ".gitignore", "README.md", "dvc.lock", "dvc.yaml", "flows/compress.py", "flows/retrain.py", "flows/sweep.py",
        "metrics/dataset.json", "params.yaml", "prefect.yaml", "requirements.txt",
    }  # fmt: skip
    (tmp_path / "requirements.txt").write_text("vitprune[pipeline,export]==0.2.0\n")
    assert "Running stage 'dataset'" in repro(tmp_path, "--dry", "dataset")


def test_images_inside_the_project_are_a_relative_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "project" / "photos")
    monkeypatch.chdir(tmp_path)
    create_project(Path("project"), Choice("folder:project/photos"))
    params = load_params(tmp_path / "project/params.yaml")
    assert params.dataset.source == "folder:photos"
    assert (params.model.name, params.model.args) == ("deit_tiny_patch16_224", {"num_classes": 2})
    pipeline = yaml.safe_load((tmp_path / "project/dvc.yaml").read_text())
    assert pipeline["stages"]["dataset"]["deps"] == ["requirements.txt", "photos"]
    repro(tmp_path / "project", "dataset")
    (tmp_path / "project/photos/a/copy.png").write_bytes((tmp_path / "project/photos/a/0.png").read_bytes())
    assert "Running stage 'dataset'" in repro(tmp_path / "project", "--dry", "dataset")


def test_images_elsewhere_are_an_absolute_dependency(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    create_project(tmp_path / "project", Choice(f"folder:{photos}", classes=1000))
    params = load_params(tmp_path / "project/params.yaml")
    assert params.dataset.source == f"folder:{photos}"
    assert (params.model.args, params.dense.start, params.dense.train) == ({}, "pretrained", None)
    assert (params.prune.method, params.prune.sparsity) == ("unit-obs", 0.4)
    assert str(photos) in yaml.safe_load((tmp_path / "project/dvc.yaml").read_text())["stages"]["dataset"]["deps"]


@pytest.mark.parametrize("source", ["digits", "hfds/some/name"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_settings_that_can_be_planned(tmp_path: Path, source: str, method: str) -> None:
    demo = (REPOSITORY / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(new_params.render(demo, source, None, method, None))
    prune = load_params(tmp_path / "params.yaml").prune
    assert prune.method == method
    plan_for(prune)
    assert "# vitprune methods lists them" in (tmp_path / "params.yaml").read_text()


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "README.md").write_text("mine\n")
    (tmp_path / ".gitignore").write_text("/out/\n/mine/")
    written = create_project(tmp_path, Choice())
    assert "README.md" not in written
    assert (tmp_path / "README.md").read_text() == "mine\n"
    ignored = (tmp_path / ".gitignore").read_text().splitlines()
    assert ignored[:2] == ["/out/", "/mine/"]
    assert ignored.count("/out/") == 1
    assert "/data/*.parquet" in ignored
    before = (tmp_path / "params.yaml").read_bytes()
    with pytest.raises(BadInput, match=r"dvc\.yaml: exists, and init does not overwrite files"):
        create_project(tmp_path, Choice(method="lamp"))
    assert (tmp_path / "params.yaml").read_bytes() == before


def test_inside_a_larger_repository_dvc_uses_a_subdirectory(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    create_project(tmp_path / "project", Choice())
    assert not (tmp_path / "project/.git").exists()
    pipeline = tmp_path / "project/dvc.yaml"
    toy = "mkdir -p data metrics && touch data/manifest.parquet metrics/dataset.json"  # only DVC's files are tested
    pipeline.write_text(pipeline.read_text().replace("cmd: vitprune dataset", f"cmd: {toy}"))
    assert "Running stage 'dataset'" in repro(tmp_path / "project", "dataset")
    assert "didn't change, skipping" in repro(tmp_path / "project", "dataset")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(method="magic"), "method 'magic': unknown; use one of random"),
        (Choice("folder:/nowhere"), "folder:/nowhere: no such folder"),
        (Choice("folder:"), "lacks the path"),
        (Choice("hfds/x", model="deit_tini"), "--model 'deit_tini': timm has no model of this name"),
        (Choice("hfds/x", model="deit_tiny_patch16_224.none"), "--classes: timm has no weights of deit_tiny"),
        (Choice(recipe="up_deit_smal"), "no recipe has this name; did you mean up_deit_small?"),
        (Choice(recipe="nothing"), "no recipe has this name; vitprune recipes lists the names"),
        (Choice(classes=3), "--classes 3: digits has 10 classes"),
    ],
)
def test_invalid_choices_leave_no_files(tmp_path: Path, choice: Choice, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        create_project(tmp_path / "project", choice)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize(
    ("unused", "classes", "message"),
    [
        ((), 1, r"--classes 1: folder:.*/photos has 2 classes; leave the option out"),
        (("b",), None, r"--classes: folder:.*/photos has one class, and a classifier needs two"),
    ],
)
def test_classes_that_do_not_fit_the_source_are_refused(tmp_path: Path, unused, classes, message: str) -> None:
    photos = write_folder(tmp_path / "photos")
    for name in unused:
        shutil.rmtree(photos / name)
    with pytest.raises(BadInput, match=message):
        create_project(tmp_path / "project", Choice(f"folder:{photos}", classes=classes))
    assert not (tmp_path / "project").exists()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file: is a file; give a directory"):
        create_project(tmp_path / "file", Choice())


def test_a_project_from_a_recipe_has_all_of_its_settings(tmp_path: Path) -> None:
    recipe = REPOSITORY / "recipes/up_deit_small.yaml"
    create_project(tmp_path / "project", Choice(recipe="up_deit_small"))
    written = yaml.safe_load((tmp_path / "project/params.yaml").read_text())
    assert "base" not in written
    assert written["prune"]["merge_heads_to"] == 6
    assert load_params(tmp_path / "project/params.yaml") == load_params(recipe)


def test_the_readme_of_the_recipes_lists_all() -> None:
    rows = [f"| [{name}]({path.name}) | {about(path)} |" for name, path in recipe_files().items()]
    lines = (REPOSITORY / "recipes/README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| [")] == rows
    assert {path.name for path in (REPOSITORY / "recipes").glob("*.yaml")} == {
        f"{name}.yaml" for name in recipe_files()
    }


def test_every_method_has_advice() -> None:
    assert METHOD_GUIDE.keys() == METHODS.keys()


def test_the_wheel_contains_all_files_of_init(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(REPOSITORY)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    scaffold = {
        "dvc.yaml",
        "params.yaml",
        "prefect.yaml",
        "flows/compress.py",
        "flows/retrain.py",
        "flows/sweep.py",
        "recipes/up_deit_small.yaml",
        "templates/README.md",
        "templates/gitignore",
        "templates/dvcignore",
    }
    assert {f"vitprune/pipeline/project_template/{name}" for name in scaffold} <= names
    assert {
        "vitprune/orchestration/compress.py",
        "vitprune/pipeline/report/templates/report.html.j2",
        "vitprune/py.typed",
    } <= names
    assert {name.split("/")[0] for name in names} == {"vitprune", "vitprune-0.1.0.dist-info"}
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", INIT, "init", "project", "--method", "lamp"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_params(tmp_path / "project/params.yaml").prune.method == "lamp"
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("Error: ")
    assert again.stderr.count("\n") == 1


def test_secrets_are_ignored_by_git_and_docker() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", ".env", "deploy/.env"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ignored.stdout.splitlines() == [".env", "deploy/.env"]
    allowed = [line[2:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!/")]
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {path.split("/")[0] for path in (*build["packages"], *build["force-include"])}
    assert needed | {"pyproject.toml", "requirements-hashes.txt", "README.md", "LICENSE"} == set(allowed)


def test_a_source_without_its_prefix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.parquet").touch()
    for source, hint in {
        str(tmp_path / "photos"): f"did you mean folder:{tmp_path}/photos?",
        str(tmp_path / "photos.parquet"): f"did you mean parquet:{tmp_path}/photos.parquet?",
        "/no/such/folder": "use digits, folder:PATH",
        "imagenet": "use digits, folder:PATH",
        "": "use digits, folder:PATH",
    }.items():
        with pytest.raises(BadInput, match=f"^--source {re.escape(source)}: unknown; {re.escape(hint)}"):
            create_project(tmp_path / "project", Choice(source))
    assert not (tmp_path / "project").exists()
