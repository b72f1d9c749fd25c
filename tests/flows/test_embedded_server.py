import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support.shell_pipeline import REPOSITORY, wait_for
from vitprune.errors import BadInput
from vitprune.orchestration.embedded_server import start_server

pytestmark = pytest.mark.pipeline
WAITS = """
from vitprune.orchestration.embedded_server import start_server
address, wait = start_server()
wait()
print(address, flush=True)
input()
"""


def test_the_server_ends_with_a_killed_process(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=REPOSITORY, env=os.environ | {"PREFECT_HOME": str(tmp_path)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdin
    assert parent.stdout
    address = parent.stdout.readline().strip()
    (server,) = psutil.Process(parent.pid).children()
    assert os.getpgid(server.pid) == server.pid
    urllib.request.urlopen(f"{address}/health").close()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, 60)
    parent.stdin.close()
    parent.stdout.close()


def test_a_server_that_does_not_start_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////missing/folder/prefect.db")
    others = psutil.Process().children()
    _, wait = start_server()
    with pytest.raises(BadInput, match=r"^Prefect's embedded server did not start \(.*unable to open.*\); run again$"):
        wait()
    assert psutil.Process().children() == others
