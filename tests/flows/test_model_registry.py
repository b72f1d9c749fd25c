"""The model registry is written again after MLflow's database was lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import preloaded
from tests.support.tiny_project import record, upload
from vitprune.orchestration.execution.processes import process_environment
from vitprune.orchestration.tracking.registry import REFUSED

pytestmark = pytest.mark.pipeline


def registry_after(project: Path, *actions: str) -> dict[str, Any]:
    done = preloaded.run("tests.support.registry_worker", str(project), *actions, cwd=project)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def vitprune(project: Path, command: str) -> tuple[int, str, str]:
    env = process_environment(project)
    done = preloaded.run("vitprune.cli", command, "--project", str(project), cwd=project, env=env)
    return done.returncode, done.stdout, done.stderr


def lose_store(project: Path) -> None:
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")


def test_lost_versions_are_registered_again_with_numbers_tags_and_champion(finished_project: Path) -> None:
    project, store = finished_project, f"sqlite:///{finished_project}/mlflow.db"
    record(project, "first")
    record(project, "second", cached=True)
    upload(project)
    kept = shutil.copytree(project, project / ".vitprune/retrain/held", ignore=shutil.ignore_patterns(".vitprune"))
    record(kept, "held")  # a challenger that was not promoted: its worktree remains
    upload(kept, store)
    before = registry_after(
        project, "add:first", "promote:1", "add:second", "add:second", "promote:3", "add:held", "delete:2", "back"
    )
    assert (before["champion"], list(before["versions"])) == ("1", ["4", "3", "1"])
    assert before["versions"]["3"][0]["vitprune.champion_before"] == "1"

    lose_store(project)
    for command in ("versions", "rollback"):
        code, out, err = vitprune(project, command)
        assert (code, out) == (2, "")
        assert err.startswith("Error: project: MLflow has lost 3 versions; run `vitprune sync --project ")
    assert vitprune(project, "sync") == (0, f"uploaded 3 runs to {store}\nregistered 3 versions again\n", "")
    assert registry_after(project) == before
    assert vitprune(project, "sync") == (0, "nothing to upload\n", "")
    assert vitprune(project, "versions")[1].count("project ") == 3

    # a version whose run is lost is named, and the others keep their numbers
    lose_store(project)
    shutil.rmtree(project / ".vitprune/journal/uploaded/second")
    (project / ".vitprune/journal/uploaded/second.jsonl").unlink()
    code, out, err = vitprune(project, "sync")
    assert (code, out) == (0, f"uploaded 2 runs to {store}\nregistered 2 versions again\n")
    assert err == "project: version 3 is lost, with its run\n"
    after = registry_after(project)
    assert after == {"champion": "1", "versions": {key: before["versions"][key] for key in ("4", "1")}}

    # a registered model that a user deletes is not lost
    assert registry_after(project, "forget") == {"champion": None, "versions": {}}
    assert vitprune(project, "sync") == (0, "nothing to upload\n", "")
    assert vitprune(project, "versions")[1].startswith("project: no version yet; ")
    (project / ".vitprune/registry.json").write_text("{")
    code, out, err = vitprune(project, "versions")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("; delete it, `vitprune sync` writes it again\n")


@pytest.mark.parametrize("folder", ["it's", 'x"y', "a:b", "名 é %20 #1"])
def test_a_folder_with_any_name_has_a_registry(finished_project: Path, folder: str) -> None:
    project = finished_project.rename(finished_project.with_name(folder))
    assert registry_after(project) == {"champion": None, "versions": {}}
    assert vitprune(project, "versions")[:2] == (
        0,
        f"{REFUSED.sub('-', folder)}: no version yet; `vitprune retrain` makes the first one\n",
    )


def test_names_that_mlflow_does_not_take_are_refused(finished_project: Path) -> None:
    done = preloaded.run("vitprune.cli", "versions", "--model", "a/b", cwd=finished_project)
    assert (done.returncode, done.stderr) == (
        2,
        "Error: model name 'a/b': MLflow takes no quotes, / and : in it; give another one\n",
    )
    project = finished_project.rename(finished_project.with_name("what?"))
    code, out, err = vitprune(project, "versions")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "MLflow takes no ? in the path; rename the folder, or set MLFLOW_TRACKING_URI" in err
    assert sorted(path.name for path in project.parent.iterdir()) == ["what?"]
