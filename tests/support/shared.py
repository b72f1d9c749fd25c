"""Data shared by all processes of a test run: built by the first process that needs them; read-only."""

import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.support.shell_pipeline import wait_for

FOLDER = "VITPRUNE_TESTS_SHARED"  # inherited by the processes of xdist
# DVC, git, SQLite and checkpoints wait for a disk; a complete run needs less than half of the room, in bytes
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
# starts a command as the leader of a process group, and writes its number to the file `pid`
LEADER = 'echo $$ > pid; exec "$@" > log 2>&1'


def folder() -> Path:
    """Return the folder of this test run, in memory if there is room.

    The process that calls this first deletes it when it ends.
    """
    if FOLDER not in os.environ:
        in_memory = "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="vitprune-tests-", dir=MEMORY if in_memory else None)
        atexit.register(_clear, Path(os.environ[FOLDER]), os.getpid())
    return Path(os.environ[FOLDER])


def _clear(place: Path, owner: int) -> None:
    """End the servers of this test run and delete its folder."""
    if os.getpid() != owner:  # a fork
        return
    for pid in place.glob("*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
    shutil.rmtree(place, ignore_errors=True)


def shared(name: str, build: Callable[[Path], object]) -> Path:
    """Return a subfolder of this test run that `build` has filled."""
    place, complete = folder() / name, folder() / f"{name}.complete"
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            build(place)
            complete.touch()
    return place


def add_empty_store(project: Path) -> None:
    """Give a project MLflow's database without a record; its migrations take ten seconds."""
    shutil.copyfile(shared("mlflow", _create_store) / "mlflow.db", project / "mlflow.db")


def _create_store(place: Path) -> None:
    from vitprune.orchestration.tracking.store import create_or_migrate  # MLflow takes seconds to import

    create_or_migrate(place / "mlflow.db")


def prefect_server() -> str:
    """Return the address of a Prefect server, which runs until the tests end."""
    return (shared("prefect", _start_prefect) / "address").read_text()


def _start_prefect(place: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PREFECT_HOME": str(place), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    subprocess.run(["setsid", "--fork", "sh", "-c", LEADER, "sh", *command], cwd=place, env=env, check=True)
    address = f"http://127.0.0.1:{port}/api"
    wait_for(lambda: _answers(address), 120)
    (place / "address").write_text(address)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True
