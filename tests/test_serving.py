"""The servers of docs/guides/serving.md give the logits of the model in Python."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import vitprune
from tests.support.model_zoo import predict
from tests.support.tiny_project import finished, record, upload
from tests.test_docs import REPOSITORY, blocks, environment
from vitprune.data import data_config, decode, example_input, transform

pytestmark = pytest.mark.pipeline

REGISTER = """
from pathlib import Path
from vitprune.orchestration.tracking.registry import registry
models = registry(Path.cwd())
run = models.client.search_runs([models.experiment], "tags.`vitprune.key` = 'served'")[0].info.run_id
models.promote(models.add(run, "served", {}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "project"
    shutil.copytree(finished(), folder, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def guide() -> dict[tuple[str, str], str]:
    """Return the code of the guide by language and title."""
    page = (REPOSITORY / "docs/guides/serving.md").read_text(encoding="utf-8")
    return {(language, title): code for language, title, code in blocks(page)}


@contextmanager
def server(command: str, old_port: str, path: str, cwd: Path) -> Iterator[str]:
    """Start a server of the guide on a free port; yield the port once it answers a request for `path`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert old_port in command
    log = cwd / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command.replace(old_port, port)],
            **{"cwd": cwd, "env": environment(), "stdout": output, "stderr": output, "start_new_session": True},
        )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        else:
            pytest.fail(log.read_text())
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=120)


def test_mlflow_serves_the_champion(project: Path, guide: dict[tuple[str, str], str]) -> None:
    record(project, "served")
    upload(project)
    command = [sys.executable, "-W", "ignore", "-c", REGISTER]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with server(guide["bash", "mlflow"], "5001", "/ping", project) as port:
        client = guide["python", "mlflow"].replace("5001", port)
        answer = subprocess.run(
            ["python", "-W", "ignore", "-c", client],
            cwd=project,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        assert float(answer.stdout.removeprefix("largest difference:")) < 1e-5
        images = json.dumps({"inputs": [[[[0.5]]]]}).encode()  # another size than the signature of the model
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", images, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)


def test_fastapi_and_onnxruntime_answer_as_the_model_does(project: Path, guide: dict[tuple[str, str], str]) -> None:
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model = vitprune.load(project / "out/distill").eval()
    vitprune.export_onnx(model, project / "out/export/model.onnx", example_input(model, 2))
    (project / "app.py").write_text(guide["python", "app.py"])
    preprocess = transform(data_config(model))
    photos = sorted((project / "../project/images").resolve().rglob("*.png"))[::60]
    assert len(photos) == 4
    with server(guide["bash", "fastapi"], "8000", "/docs", project) as port:
        for photo in photos:
            shutil.copy(photo, project / "photo.png")
            client = guide["bash", "client"].replace("8000", port)
            answer = json.loads(subprocess.run(client, cwd=project, shell=True, capture_output=True, check=True).stdout)
            image = preprocess.image(decode(photo.read_bytes(), preprocess.mode))
            logits = predict(model, image[None])[0]
            torch.testing.assert_close(torch.tensor(answer["logits"]), logits, rtol=0, atol=1e-4)
            assert answer["class"] == int(logits.argmax())
        request = urllib.request.Request(f"http://127.0.0.1:{port}/classify", b"no image", method="POST")
        request.add_header("Content-Type", "application/octet-stream")
        with pytest.raises(urllib.error.HTTPError, match="415"):
            urllib.request.urlopen(request)
