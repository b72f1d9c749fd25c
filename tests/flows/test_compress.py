import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import preloaded, shell_pipeline
from tests.support.shared import add_empty_store
from tests.support.shell_pipeline import REPOSITORY, processes_of, sleepers, wait_for
from vitprune.config.params import load_params
from vitprune.errors import BadInput
from vitprune.orchestration.execution.lock_and_repair import LOCKFILE_COPY, exclusive, is_complete, repair
from vitprune.orchestration.execution.processes import MARK, run
from vitprune.orchestration.execution.run_stage import FailureClass, reproduce

pytestmark = pytest.mark.pipeline
DEAD = "http://127.0.0.1:9"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = shell_pipeline.make(tmp_path / "project")
    add_empty_store(project)
    return project


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def refused(project: Path) -> tuple[int, str, str]:
    """Run `vitprune run` on a project that it refuses before it loads Prefect."""
    done = preloaded.run("vitprune.cli", "run", "--project", str(project), cwd=REPOSITORY)
    return done.returncode, done.stdout, done.stderr


def test_output_is_streamed_by_line_and_the_exit_code_is_kept() -> None:
    lines: list[str] = []
    ended = run(["sh", "-c", "echo one; echo two >&2; exit 7"], Path("/"), os.environ, None, lines.append)
    assert (lines, ended.exit_code, ended.timed_out) == (["one", "two"], 7, False)


def test_the_limit_kills_a_stage_with_its_grandchildren(project: Path) -> None:
    (project / "sleep_dataset").touch()
    result = reproduce("dataset", project, 4, lambda line: None)
    assert result.failure is FailureClass.LIMIT
    assert "--stage-limit 4" in result.error
    assert processes_of(project) == []
    (project / "sleep_dataset").unlink()
    assert reproduce("dataset", project, 60, lambda line: None).exit_code == 0


def test_failure_classes_are_recognized_through_dvc(project: Path) -> None:
    (project / "bad_dataset").touch()
    bad = reproduce("dataset", project, None, lambda line: None)
    assert (bad.failure, bad.exit_code) == (FailureClass.INPUT, 2)
    assert bad.error == "dataset: params.yaml: prune.sparsity is 2; give 0 to 1"
    (project / "bad_dataset").unlink()
    (project / "lost_dataset").touch()
    assert reproduce("dataset", project, None, lambda line: None).failure is FailureClass.INFRASTRUCTURE
    for code, failure in (
        ("75", FailureClass.INFRASTRUCTURE),
        ("143", FailureClass.INFRASTRUCTURE),
        ("1", FailureClass.STAGE),
    ):
        (project / "code_dataset").write_text(code)
        assert reproduce("dataset", project, None, lambda line: None).failure is failure
    (project / "code_dataset").unlink()
    assert not reproduce("dataset", project, None, lambda line: None).cached
    assert reproduce("dataset", project, None, lambda line: None).cached
    shutil.rmtree(project / "data")
    assert reproduce("dataset", project, None, lambda line: None).cached  # taken from DVC's cache of runs
    (project / "params.yaml").write_text("seed: 0\n")
    assert reproduce("dataset", project, None, lambda line: None).failure is FailureClass.INPUT


def test_a_damaged_cache_object_fails_the_stage_and_the_command_of_the_message_repairs_it(project: Path) -> None:
    for stage in ("dataset", "dense"):
        assert reproduce(stage, project, None, lambda line: None).exit_code == 0
    weights = project / "out/dense/weights"
    (cached,) = [
        p for p in (project / ".dvc/cache/files").rglob("*") if p.is_file() and p.read_bytes() == b"dense made this\n"
    ]
    times = cached.stat()
    cached.chmod(0o644)
    cached.write_bytes(b"dense made thaT\n")
    cached.chmod(0o444)
    os.utime(cached, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(project / "out/dense")
    result = reproduce("dense", project, None, lambda line: None)
    assert (result.exit_code, result.failure) == (1, FailureClass.STAGE)
    assert result.error == (
        f"dense: out/dense/: has another MD5 than in dvc.lock; run `rm -rf {weights.parent} {cached}`, then run again"
    )
    subprocess.run(result.error.split("`")[1].split(), check=True)
    assert reproduce("dense", project, None, lambda line: None).exit_code == 0
    assert weights.read_text() == "dense made this\n"


def test_a_misspelled_parameter_that_dvc_ignores_is_an_error(project: Path) -> None:
    load_params(project / "params.yaml")
    with (project / "params.yaml").open("a") as file:
        file.write("sparsty: 1\n")
    with pytest.raises(BadInput, match="sparsty"):
        load_params(project / "params.yaml")


def test_a_second_run_is_refused_in_one_line(project: Path) -> None:
    with exclusive(project):
        code, out, err = refused(project)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"process {os.getpid()}" in err


def test_files_left_by_a_kill_are_repaired(project: Path) -> None:
    output: list[str] = []
    assert reproduce("dataset", project, None, lambda line: None).exit_code == 0
    lock, rwlock = project / "dvc.lock", project / ".dvc/tmp/rwlock"
    full = lock.read_text()
    (project / LOCKFILE_COPY).parent.mkdir()
    shutil.copyfile(lock, project / LOCKFILE_COPY)
    lock.write_text(full[: len(full) // 2])
    rwlock.write_text('{"write": {"/so')
    # its parent ends immediately, like a killed flow
    subprocess.run(["sh", "-c", "sleep 600.25 &"], env=os.environ | {MARK: str(project)}, check=True)
    wait_for(lambda: sleepers(project), 60)
    repair(project, output.append)
    wait_for(lambda: not processes_of(project), 60)
    assert len(output) == 3
    assert lock.read_text() == full
    # the number of a dead DVC process, taken by a process that is not DVC
    held = {"write": {f"{project}/data/manifest.parquet": {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}
    rwlock.write_text(str(held).replace("'", '"'))
    repair(project, output.append)
    assert reproduce("dataset", project, None, lambda line: None).exit_code == 0
    assert is_complete(lock)


def test_a_truncated_run_cache_entry_is_deleted(project: Path) -> None:
    output: list[str] = []
    assert reproduce("dataset", project, None, lambda line: None).exit_code == 0
    (entry,) = (project / ".dvc/cache/runs").glob("*/*/*")
    entry.unlink()
    os.utime(entry.parent, (0, 0))
    (project / "dvc.lock").unlink()
    assert reproduce("dataset", project, None, lambda line: None).exit_code != 0  # as long as the entry exists
    repair(project, output.append)
    assert output == ["removed 1 empty entries of DVC's run cache, left by a kill or a full disk"]
    assert reproduce("dataset", project, None, lambda line: None).exit_code == 0


def test_a_run_cache_entry_that_another_process_writes_is_an_infrastructure_failure(project: Path) -> None:
    assert reproduce("dataset", project, None, lambda line: None).exit_code == 0
    (entry,) = (project / ".dvc/cache/runs").glob("*/*/*")
    vanished = entry.with_name(".UuYWLVBg6s7ssjmWUUbGNN.tmp")
    vanished.symlink_to("moved")  # listed, but missing when DVC reads it
    (project / "dvc.lock").unlink()
    assert reproduce("dataset", project, None, lambda line: None).failure is FailureClass.INFRASTRUCTURE
    vanished.unlink()
    assert reproduce("dataset", project, None, lambda line: None).cached


def test_bad_input_gives_exit_code_2_and_one_line(project: Path, server: str) -> None:
    (project / "bad_dataset").touch()
    code, _, err = finish(shell_pipeline.flow(project, PREFECT_API_URL=server))
    assert code == 2
    assert "Error: dataset: params.yaml: prune.sparsity is 2; give 0 to 1\n" in err
    assert "Traceback" not in err
    assert err.count("\n") < 10


def test_an_unwritable_run_log_is_reported(project: Path, server: str) -> None:
    (project / ".vitprune").touch()
    code, out, err = finish(shell_pipeline.flow(project))
    assert (code, out, err) == (2, "", f"Error: {project}/.vitprune: File exists\n")
    (project / ".vitprune").unlink()
    (project / ".vitprune").mkdir()
    (project / ".vitprune/journal").touch()
    code, _, err = finish(shell_pipeline.flow(project, PREFECT_API_URL=server))
    assert code == 1
    assert err.splitlines()[-1] == f"Error: {project}/.vitprune/journal: File exists; correct it and run again"
    assert "Traceback" not in err


def test_a_killed_flow_resumes_with_the_result_of_plain_dvc(project: Path, server: str, tmp_path: Path) -> None:
    plain = shell_pipeline.make(tmp_path / "plain")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=plain, check=True)
    (project / "sleep_dense").touch()
    killed = shell_pipeline.flow(project, PREFECT_API_URL=server)
    wait_for(lambda: sleepers(project), 120)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    wait_for(lambda: not processes_of(project), 60)
    (project / "sleep_dense").unlink()

    code, out, err = finish(shell_pipeline.flow(project, PREFECT_API_URL=server))
    assert code == 0, err
    assert "9 stages ran, 1 cached" in out
    assert "the project has no commit, so `vitprune audit` cannot verify this run" in out
    assert (project / "dvc.lock").read_text() == (plain / "dvc.lock").read_text()

    # unreachable Prefect and MLflow servers: the run continues and reports them at the end
    dead = {"PREFECT_API_URL": f"{DEAD}/api", "MLFLOW_TRACKING_URI": DEAD}
    code, out, err = finish(shell_pipeline.flow(project, **dead))
    assert code == 0, err
    assert "nothing to compute: all 10 stages were cached" in out
    assert out.count(f"Prefect server {DEAD}/api does not answer") == 2
    assert "vitprune sync" in out
    assert processes_of(project) == []
