import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import preloaded
from tests.support.shared import add_empty_store
from tests.support.shell_pipeline import REPOSITORY
from tests.support.tiny_project import record
from vitprune.orchestration.execution.processes import process_environment
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.tracking.journal import CURVES, RunLog, read_log
from vitprune.orchestration.tracking.live_curves import follow

pytestmark = pytest.mark.pipeline

# another flow makes the experiment after this one has looked for it
RACE = """
import sys
from pathlib import Path
from mlflow import MlflowClient
from vitprune.orchestration.tracking.store import open_client
look = MlflowClient.get_experiment_by_name
def too_early(self, name):
    MlflowClient.get_experiment_by_name = look
    found = look(self, name)
    MlflowClient(tracking_uri=self.tracking_uri).create_experiment(name)
    return found
MlflowClient.get_experiment_by_name = too_early
client, experiment = open_client(Path(sys.argv[1]))
print(client.get_experiment(experiment).name)
"""

# run logs that were edited or truncated in the middle; the others are uploaded
DAMAGED = {
    "no-time": b'{"fact": "start"}\n',
    "list": b'[1, 2]\n{"fact": "start"}\n',
    "not-utf-8": b"\xff\xfe\n\n",
    "not-json": b'{"fact": "sta\n{"fact": "start", "time": 1}\n',
    "nested": b"[" * 100000 + b"\n{}",
    "other-types": b'{"fact": "start", "time": "now", "params": 3, "git": [], "files": {}}\n',
}


def read_mlflow(uri: str) -> dict[str, list[dict]]:
    done = preloaded.run("tests.support.read_mlflow", uri, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def start_replay(project: Path, uri: str | None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vitprune.cli", "sync", "--project", str(project)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(uri), text=True, **pipes)


def replay(project: Path, uri: str | None) -> tuple[int, str, str]:
    """Run `vitprune sync` in a new interpreter, which shows warnings."""
    process = start_replay(project, uri)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def sync(project: Path, uri: str | None = None) -> tuple[int, str, str]:
    done = preloaded.run("vitprune.cli", "sync", "--project", str(project), cwd=project, env=environment(uri))
    return done.returncode, done.stdout, done.stderr


def environment(uri: str | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return env | ({"MLFLOW_TRACKING_URI": uri} if uri else {})


def log_curve(project: Path, *arguments: str) -> int:
    """Call `log_curve` as `isolated.call` does."""
    function = "vitprune.orchestration.tracking.live_curves:log_curve"
    words, env = json.dumps([str(project), *arguments]), process_environment(project)
    done = preloaded.run("vitprune.orchestration.execution.isolated", function, words, cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def project(finished_project: Path) -> Path:
    return finished_project


@pytest.fixture
def address() -> str:
    """Address of a server that is not running yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def server(address: str, tmp_path: Path) -> Iterator[Path]:
    """A real MLflow server and its artifact directory."""
    artifacts, store = tmp_path / "artifacts", f"sqlite:///{tmp_path}/mlflow.db"
    add_empty_store(tmp_path)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.rsplit(":")[-1]]
    command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    yield artifacts
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_an_unreachable_server_is_reported_in_one_line_and_no_record_is_lost(project: Path, address: str) -> None:
    journal = record(project, "first")
    began = time.monotonic()
    code, out, err = replay(project, address)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert time.monotonic() - began < 60
    assert len(read_log(journal.path)) == len(STAGES) + 2
    assert (journal.spool / "out/report/report.html").is_file()


def test_a_repeated_upload_is_idempotent(project: Path, address: str, server: Path) -> None:
    evaluation = json.loads((project / "metrics/evaluate.json").read_text())
    cycles = len(list((project / "out/cycles").iterdir()))
    record(project, "first")
    record(project, "second", cached=True)
    for folder in ("out", "metrics", "plots", "data"):  # changes by a later run must have no effect
        shutil.rmtree(project / folder)
    cut_off = start_replay(project, address)
    while not list(server.rglob("*.jsonl")):  # during the run: the curve of the second stage is uploaded
        time.sleep(0.05)
    cut_off.kill()
    cut_off.communicate()
    for name, content in DAMAGED.items():
        (project / f".vitprune/journal/{name}.jsonl").write_bytes(content)
    code, out, err = replay(project, address)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"uploaded 2 runs; not uploaded: {len(DAMAGED)} ({project}/.vitprune/journal/")
    for name in DAMAGED:
        (project / f".vitprune/journal/{name}.jsonl").unlink()
    assert sync(project, address)[1] == "nothing to upload\n"
    assert not list((project / ".vitprune/spool").iterdir())

    seen = read_mlflow(address)
    first, second = ([r for r in seen["runs"] if r["tags"]["vitprune.key"].startswith(k)] for k in ("first", "second"))
    assert len(first) == 1 + len(STAGES) + cycles
    assert len(second) == 1 + len(STAGES)
    check_computed(first, evaluation, cycles)
    check_cached(second, {run["id"]: run["name"] for run in first})
    (model,) = seen["models"]
    assert sorted(model["files"]) == ["MLmodel", "config.json", "model.safetensors"]
    assert model["status"] == "READY"
    assert seen["kind"]["mlflow.experimentKind"] == "custom_model_development"
    assert model["metrics"]["pruned.top1"] == evaluation["pruned"]["top1"]


def check_computed(runs: list[dict], evaluation: dict, cycles: int) -> None:
    by_name = {run["name"]: run for run in runs}
    parent = by_name["compress-first"]
    assert parent["params"]["prune.method"] == "channel-taylor"
    assert parent["metrics"]["dense.top1"] == evaluation["dense"]["top1"]
    assert parent["datasets"] == [parent["params"]["dataset.source"]]
    assert f"| top-1 | {evaluation['dense']['top1']:.2f} % |" in parent["tags"]["mlflow.note.content"]
    assert len([tag for tag in parent["tags"] if tag.startswith("vitprune.")]) <= 10
    assert parent["files"]["out/report/report.html"] == by_name["report"]["files"]["out/report/report.html"]
    assert parent["tags"]["vitprune.dvc_lock_sha256"] == parent["files"]["dvc.lock"]
    assert {"vitprune.manifest_sha256", "vitprune.calibration_sha256", "mlflow.source.git.commit"} <= set(
        parent["tags"]
    )
    for stage in STAGES:
        assert by_name[stage]["tags"]["mlflow.parentRunId"] == parent["id"]
        assert by_name[stage]["tags"]["vitprune.cached"] == "false"
    assert by_name["dense"]["metrics"]["curve.loss"] > 0
    assert "out/report/report.html" in by_name["report"]["files"]
    for number in range(1, cycles + 1):
        cycle = by_name[f"cycle-{number:02d}"]
        masks = cycle["files"][f"out/cycles/{number:02d}/masks.safetensors"]
        assert f"out/cycles/{number:02d}/model.safetensors" not in cycle["files"]  # DVC has it
        assert cycle["tags"]["vitprune.masks_sha256"] == masks
        assert cycle["tags"]["mlflow.parentRunId"] == by_name["prune"]["id"]


def check_cached(runs: list[dict], computed: dict[str, str]) -> None:
    for run in runs:
        if run["name"] != "compress-second":
            assert run["tags"]["vitprune.cached"] == "true"
            assert computed[run["tags"]["vitprune.computed_by"]] == run["name"]
            assert run["files"] == {}


def test_concurrent_first_uses_of_the_local_store_are_safe(project: Path) -> None:
    (project / "mlflow.db").unlink()
    record(
        project, "first", cached=True
    )  # computed by `dvc repro` before: no earlier run has the files, so this run contains them
    both = [start_replay(project, None) for _ in range(2)]
    output = sorted(process.communicate(timeout=180)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert output == ["nothing to upload\n", f"uploaded 1 run to sqlite:///{project}/mlflow.db\n"]
    seen = read_mlflow(f"sqlite:///{project}/mlflow.db")
    assert {run["name"] for run in seen["runs"] if run["status"] == "FINISHED"} >= {
        "compress-first",
        *STAGES,
        "cycle-01",
    }


def test_concurrent_flows_create_one_experiment(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    add_empty_store(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", RACE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["vitprune"]), done.stderr


def test_a_lost_store_is_written_again_from_the_run_logs(project: Path) -> None:
    record(project, "first")
    assert sync(project)[0] == 0
    store = f"sqlite:///{project}/mlflow.db"
    before = read_mlflow(store)
    archive = project / ".vitprune/journal/uploaded/first"
    assert (archive / "dvc.lock").exists()
    assert not (archive / "out").exists()  # DVC's cache has it
    for folder in ("out", "metrics", "plots", "data", "mlartifacts"):
        shutil.rmtree(project / folder)
    database = project / "mlflow.db"
    content = database.read_bytes()
    for damaged in (content[:5000], content[:8192] + b"\xff" * 8192 + content[16384:]):
        database.write_bytes(damaged)
        code, out, err = sync(project)
        assert (code, out) == (1, "")
        assert f"{database}: the database is damaged (" in err
        assert f"move it away and run `vitprune sync --project {project}`" in err
        assert err.count("\n") == 1
    database.unlink()
    assert sync(project)[:2] == (0, f"uploaded 1 run to {store}\n")
    assert sync(project)[1] == "nothing to upload\n"
    after = read_mlflow(store)
    assert described(after) == described(before)
    assert [model["files"] for model in after["models"]] == [model["files"] for model in before["models"]]

    # files that no cache has are named, and the others are written
    for name in (".dvc/cache", "mlartifacts"):
        shutil.rmtree(project / name)
    database.unlink()
    code, out, err = sync(project)
    assert (code, out) == (0, f"uploaded 1 run to {store}\n")
    assert "lost, and in no cache: metrics/" in err
    files = {run["name"]: run["files"] for run in read_mlflow(store)["runs"]}
    assert set(files["compress-first"]) == {
        "attestation.jsonl", "params.yaml", "dvc.yaml", "dvc.lock", "journal.jsonl",
    }  # fmt: skip
    assert files["report"] == {}


def test_curves_of_a_running_stage_are_replaced_by_its_records(project: Path) -> None:
    run_log, store = RunLog(project, "first"), f"sqlite:///{project}/mlflow.db"
    epochs = len((project / CURVES["dense"]).read_text().splitlines())
    run_log.start(time.time())
    for logged, rest in ((2, 2), (epochs, epochs - 2)):
        times = json.dumps([1.7e9 + number for number in range(logged)])
        assert log_curve(project, "first", "dense", times) == rest
    (live,) = read_mlflow(store)["runs"]
    assert (live["name"], live["status"]) == ("compress-first (running)", "RUNNING")
    assert {"dense.loss", "dense.lr", "dense.top1"} <= live["metrics"].keys()
    run_log.path.unlink()
    record(project, "first")
    assert sync(project)[0] == 0
    names = {run["name"]: run["id"] for run in read_mlflow(store)["runs"]}
    assert {"compress-first", *STAGES} <= names.keys()
    assert live["id"] not in names.values()
    assert log_curve(project, "first", "dense", times) == 0  # a late upload creates no run


def test_epochs_have_the_time_at_which_they_were_recorded(tmp_path: Path) -> None:
    curve = tmp_path / CURVES["dense"]
    curve.parent.mkdir(parents=True)
    curve.write_text("{}\n{}\n{}\n")  # of an earlier run
    os.utime(curve, (1, 1))
    began = time.time()
    with follow(tmp_path, "first", "dense") as times:
        pass
    assert times == []
    with follow(tmp_path, "first", "dense") as times:
        curve.write_text("{}\n{}\n{")  # the third line is being written
    assert len(times) == 2
    assert all(began <= moment <= time.time() for moment in times)
    with follow(tmp_path, "first", "score") as times:
        assert times == []


def described(seen: dict[str, list[dict]]) -> dict[str, dict]:
    """Return everything of the runs except the ids that MLflow chooses."""
    own = {"mlflow.parentRunId"}
    return {
        run["name"]: {key: run[key] for key in ("status", "params", "metrics", "files")}
        | {"tags": {name: value for name, value in run["tags"].items() if name not in own}}
        for run in seen["runs"]
    }
