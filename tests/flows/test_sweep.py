"""`vitprune sweep` started, killed and started again; its worktrees, records and outputs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.flows.test_mlflow import read_mlflow
from tests.support import shell_pipeline
from tests.support.shared import add_empty_store
from tests.support.shell_pipeline import processes_of, sleepers, wait_for
from vitprune.errors import BadInput
from vitprune.orchestration.cli_sweep import remove_worktrees
from vitprune.orchestration.execution.lock_and_repair import exclusive
from vitprune.orchestration.execution.worktrees import WorktreeError, project_state

pytestmark = pytest.mark.pipeline
GIT = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
RUNS = [f"{method}-sparsity-{share}" for method in ("channel-magnitude", "channel-taylor") for share in (0.3, 0.5)]
FAIL_ONE_RUN = """
if [ $stage = prune ] && [ ! -f mended ] && grep -q 'sparsity: 0.5' params.yaml && grep -q channel-taylor params.yaml
then echo 'Error: planned failure' >&2; exit 2; fi
"""


def commit(project: Path) -> None:
    for command in ([*GIT, "add", "-A"], [*GIT, "commit", "-q", "-m", "A project."]):
        subprocess.run(command, cwd=project, check=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of toy stages, one of which fails in one run of the sweep; a file records the executed stages."""
    made = shell_pipeline.make(tmp_path / "project")
    script = (made / "stage.sh").read_text().replace("stage=$1; shift\n", "stage=$1; shift\n" + FAIL_ONE_RUN)
    (made / "stage.sh").write_text(script.replace('echo "$stage begins"', f'echo "$stage $PWD" >> {tmp_path}/ran'))
    (made / "sweep.yaml").write_text(
        yaml.safe_dump({"methods": ["channel-magnitude", "channel-taylor"], "targets": [0.3, 0.5]})
    )
    commit(made)
    add_empty_store(made)
    return made


def start(project: Path, *options: str, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "vitprune.cli", "sweep", "--project", str(project), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | env, text=True, start_new_session=True, **pipes)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def test_a_killed_sweep_resumes_and_names_failed_runs(project: Path, server: str, tmp_path: Path) -> None:
    folder, out = project / ".vitprune/sweeps/sweep", project / "out/sweeps/sweep"
    worktrees = {run: folder / "runs" / run for run in RUNS}
    (project / "sleep_dense").touch()
    killed = start(project, str(project / "sweep.yaml"), PREFECT_API_URL=server)
    wait_for(lambda: sleepers(worktrees[RUNS[0]]), 300)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (project / "sleep_dense").unlink()

    code, _, err = finish(start(project, str(project / "sweep.yaml"), "--jobs", "2", PREFECT_API_URL=server))
    assert code == 1
    assert f"Error: 1 of 4 runs failed: {RUNS[3]} (prune: planned failure)\n" in err
    assert processes_of(worktrees[RUNS[0]]) == []
    ran = (tmp_path / "ran").read_text().splitlines()
    for common in ("dataset", "calibrate"):
        assert [line.split()[1] for line in ran if line.startswith(common)] == [str(worktrees[RUNS[0]])]
    assert "- channel-taylor-sparsity-0.5: prune: planned failure\n" in (out / "sweep.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        "pareto.png", "pareto.svg", "sweep.html", "sweep.md", "sweep.parquet"
    }  # fmt: skip

    (project / "mended").touch()
    code, output, err = finish(start(project, str(project / "sweep.yaml"), PREFECT_API_URL=server))
    assert code == 0, err
    assert (output + err).count("already finished") == 3
    more = (tmp_path / "ran").read_text().splitlines()[len(ran) :]
    # distill, evaluate and export do not depend on the settings of prune: the toy's other runs have the same inputs
    assert [line.split()[0] for line in more] == ["prune", "report"]
    assert {line.split()[1] for line in more} == {str(worktrees[RUNS[3]])}
    assert not (project / "dvc.lock").exists()  # the project's own stages did not change

    runs = read_mlflow(f"sqlite:///{project / 'mlflow.db'}")["runs"]
    (above,) = [run for run in runs if run["name"] == "sweep"]
    below = [run for run in runs if run["tags"].get("mlflow.parentRunId") == above["id"]]
    assert {run["name"] for run in below} == set(RUNS)
    assert above["status"] == "FINISHED"
    assert {"pareto.png", "sweep.html", "sweep.md", "sweep.parquet"} <= set(above["files"])
    assert {run["params"]["prune.method"] for run in below} == {"channel-magnitude", "channel-taylor"}

    with pytest.raises(BadInput, match=r"sweep other: not in .*; its sweeps: sweep"):
        remove_worktrees(project, "other")
    remove_worktrees(project, "sweep")
    assert not (folder / "runs").exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=project, capture_output=True, text=True)
    assert listed.stdout.count("\n") == 1
    uploaded = project / ".vitprune/journal/uploaded"
    assert len(list(uploaded.glob("*.jsonl"))) >= len(RUNS)  # from which a lost MLflow store is written again


def test_invalid_input_gives_a_one_line_error_and_starts_no_run(project: Path, tmp_path: Path) -> None:
    for options, message in [
        (["--methods", "magic", "--targets", "0.5"], "Error: method 'magic': unknown; use one of random"),
        (["--methods", "lamp", "--targets", "macs=0.01,2"], "targets.1: Input should be less than 1, got 2.0"),
        (["--jobs", "0", "sweep.yaml"], "Error: --jobs 0: must be at least 1"),
        (["--methods", "lamp"], "Error: give a sweep FILE, or --methods and --targets"),
    ]:
        code, out, err = finish(start(project, *options))
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    with exclusive(project / ".vitprune/sweeps/sweep"):
        code, _, err = finish(start(project, "--methods", "lamp", "--targets", "0.5"))
    assert code == 2
    assert "another sweep is active in this project" in err
    assert not (tmp_path / "ran").exists()
    assert not (project / ".vitprune/sweeps/sweep/runs").exists()


def test_a_worktree_has_the_current_state_of_the_project(project: Path, tmp_path: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    with (project / ".gitignore").open("a") as file:
        file.write("/photos/\n")
    for name in ("photos", "metrics", "out/dense"):
        (project / name).mkdir(parents=True)
        (project / name / "file").write_text("here")
    (project / "new.txt").write_text("new")
    params["dataset"]["source"] = "folder:photos"
    home = project_state(project).check_out(tmp_path / "place", params)
    assert yaml.safe_load((home / "params.yaml").read_text()) == params
    assert (home / "new.txt").read_text() == "new"
    assert (home / "photos").resolve() == project / "photos"
    assert not (home / "metrics").exists()
    assert not (home / "out").exists()
    assert f"dir = {project / '.dvc/cache'}\n" in (home / ".dvc/config.local").read_text()
    written = (home / "stage.sh").stat().st_mtime_ns
    (home / "out").mkdir()
    (home / "out/result").touch()
    (project / "new.txt").unlink()
    (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text() + "# changed\n")
    assert project_state(project).check_out(tmp_path / "place", params) == home
    assert not (home / "new.txt").exists()
    assert (home / "dvc.yaml").read_text().endswith("# changed\n")
    assert (home / "out/result").exists()
    assert (home / "stage.sh").stat().st_mtime_ns == written
    assert (project / "photos/file").read_text() == "here"


def test_without_git_a_run_uses_a_copy(project: Path, tmp_path: Path) -> None:
    subprocess.run(["rm", "-rf", str(project / ".git")], check=True)
    (project / "data").mkdir(exist_ok=True)
    (project / "data/manifest.parquet").touch()
    params = yaml.safe_load((project / "params.yaml").read_text())
    home = project_state(project).check_out(tmp_path / "place", params)
    assert (home / "stage.sh").read_text() == (project / "stage.sh").read_text()
    assert not (home / "data/manifest.parquet").exists()  # written by a stage
    (project / "stage.sh").write_text("changed")
    assert (project_state(project).check_out(tmp_path / "place", params) / "stage.sh").read_text() == "changed"


def test_projects_without_possible_worktrees_are_refused(project: Path, tmp_path: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    for source, message in [
        ("folder:../photos", "is outside the project"),
        ("folder:out/x", "is an output of the runs"),
    ]:
        with pytest.raises(WorktreeError, match=f"dataset.source: .*{message}"):
            project_state(project).check_out(
                tmp_path / "place", json.loads(json.dumps(params)) | {"dataset": {"source": source}}
            )
    subprocess.run(["rm", "-rf", str(project / ".git")], check=True)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    with pytest.raises(WorktreeError, match="has no commit yet"):
        project_state(project)
