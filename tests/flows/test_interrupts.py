import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from tests.support import shell_pipeline
from tests.support.shared import add_empty_store
from tests.support.shell_pipeline import REPOSITORY, processes_of, sleepers
from vitprune.orchestration.cli_compress import STOPPED
from vitprune.orchestration.execution.processes import process_environment, run
from vitprune.orchestration.tracking.journal import read_log

pytestmark = pytest.mark.pipeline
CTRL_C = b"\x03"
# like a training, it saves its state after a signal, which takes some time
SAVES = "trap 'sleep 1; touch saved; exit 143' INT TERM\n"


class Terminal:
    """`vitprune run` as the foreground job of a pseudo-terminal, and what it has printed."""

    def __init__(self, project: Path, env: dict[str, str]):
        self.screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vitprune.cli", "run", "--project", str(project)],
            cwd=REPOSITORY, env=os.environ | env, stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(terminal)
        self.text = ""

    def read_until(self, happened, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, self.text
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.screen, 65536).decode()
                except OSError:  # the job has ended
                    time.sleep(0.1)

    def press(self, key: bytes) -> None:
        os.write(self.screen, key)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = shell_pipeline.make(tmp_path / "project")
    (project / "sleep_dense").touch()
    add_empty_store(project)
    return project


@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_a_checkpoint_and_ends_the_flow_with_one_line(project: Path, by: str) -> None:
    (project / "stage.sh").write_text(SAVES + shell_pipeline.SCRIPT)
    job = Terminal(project, {})  # with the embedded Prefect server
    job.read_until(lambda: "dense begins" in job.text and sleepers(project), 240)
    start = len(job.text)
    if by == "Ctrl-C":
        job.press(CTRL_C)
    else:
        os.killpg(job.process.pid, signal.SIGTERM)  # as `timeout` and systemd do
    job.read_until(lambda: "stopped; run again" in job.text, 20)
    job.read_until(lambda: job.process.poll() is not None, 100)
    assert job.process.returncode == 130
    after = re.sub(r"\x1b\[\d*m", "", job.text[start:]).removeprefix("^C").splitlines()
    assert [line for line in after if line] == [STOPPED], job.text
    assert (project / "saved").exists()
    (log,) = (project / ".vitprune/journal").glob("*.jsonl")
    assert read_log(log)[-1]["status"] == "KILLED"
    assert processes_of(project) == []
    os.close(job.screen)


def test_a_second_ctrl_c_ends_the_flow_without_waiting(project: Path, server: str) -> None:
    (project / "stage.sh").write_text("trap '' INT TERM\n" + shell_pipeline.SCRIPT)
    job = Terminal(project, {"PREFECT_API_URL": server})
    job.read_until(lambda: "dense begins" in job.text and sleepers(project), 240)
    job.press(CTRL_C)
    job.read_until(lambda: "stopped; run again" in job.text, 20)
    job.press(CTRL_C)
    job.read_until(lambda: job.process.poll() is not None, 20)
    assert job.process.returncode == 130
    assert "Traceback" not in job.text
    assert processes_of(project) == []
    os.close(job.screen)


# As DVC after SIGTERM to the group: the first thread ends before the others do, and the stage is no child of it.
LOSES_ITS_STAGE = """
import ctypes, os, signal, subprocess, threading, time
stage = "trap 'kill $!; sleep 1; touch saved; exit 143' TERM; sleep 600.25 & touch started; wait"
subprocess.run(["sh", "-c", 'sh -c "$0" & echo $!', stage])
while not os.path.exists("started"):
    time.sleep(0.01)
def end():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end).start()
print("lost", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_stage_that_lost_dvc_saves_its_checkpoint(tmp_path: Path) -> None:
    pids: list[int] = []

    def line(text: str) -> None:
        if text == "lost":
            os.kill(pids[0], signal.SIGTERM)
            raise KeyboardInterrupt
        pids.append(int(text))

    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", LOSES_ITS_STAGE], tmp_path, process_environment(tmp_path), None, line)
    assert (tmp_path / "saved").exists()
    assert processes_of(tmp_path) == []


def test_processes_that_end_meanwhile_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(process: psutil.Process) -> str:
        raise psutil.NoSuchProcess(process.pid)

    def line(text: str) -> None:
        monkeypatch.setattr(psutil.Process, "name", ended)
        raise KeyboardInterrupt

    stage = "trap 'kill $!; sleep 1; touch saved; exit 143' TERM; sleep 600.25 & echo begins; wait"
    command = [sys.executable, "-c", f'import subprocess; subprocess.run(["sh", "-c", "{stage}"])']
    with pytest.raises(KeyboardInterrupt):
        run(command, tmp_path, process_environment(tmp_path), None, line)
    assert (tmp_path / "saved").exists()


WAITS_AT_EXIT = """
import os, signal, sys, threading, time
from vitprune.orchestration import interrupts
interrupts.EXIT_SECONDS = 1.0
threading._register_atexit(threading.Event().wait)  # as Prefect does, for a server that has ended
def body(interrupted):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
sys.exit(interrupts.run_interruptibly(body, "stopped"))
"""


def test_a_process_that_waits_at_exit_is_ended() -> None:
    ran = subprocess.run([sys.executable, "-c", WAITS_AT_EXIT], cwd=REPOSITORY, capture_output=True, timeout=120)
    assert (ran.returncode, ran.stderr.strip()) == (130, b"stopped")


ENDS = """
import atexit, os, signal, sys, time
from vitprune.orchestration import interrupts
def at_exit():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
atexit.register(at_exit)  # as the end of Prefect's server
sys.exit(interrupts.run_interruptibly(lambda interrupted: 3, "stopped"))
"""


def test_a_signal_after_the_body_changes_neither_the_exit_code_nor_the_output() -> None:
    ran = subprocess.run([sys.executable, "-c", ENDS], cwd=REPOSITORY, capture_output=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (3, b"")
