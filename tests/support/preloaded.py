"""Run a module's command line in a fork of a process that has already imported what the module needs.

Each fork is a process of its own, with its own arguments, environment, working directory and exit code. It saves the
imports, which take longer than most of the commands themselves. A test that needs a new interpreter starts one itself.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.subprocesses import ONE_THREAD

REPOSITORY = Path(__file__).parents[2]
STORE = "mlflow.store.tracking.sqlalchemy_store"
IMPORTS = {
    "dvc": ("dvc.cli.parser",),
    "vitprune.cli": ("vitprune.pipeline.verify", "vitprune.orchestration.cli_audit", STORE),
    "vitprune.orchestration.execution.isolated": (STORE,),
    "tests.support.read_mlflow": (STORE,),
    "tests.support.registry_worker": (STORE,),
    "tests.support.cap_worker": ("vitprune.pipeline.verify",),
    "tests.support.score_worker": ("vitprune.pipeline.verify",),
    "tests.support.train_worker": ("vitprune.pipeline.verify",),
}
_ONE_AT_A_TIME = threading.Lock()


def run(
    module: str, *words: str, cwd: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `python -W ignore -m MODULE WORDS...` and capture its output."""
    return _run(module, words, cwd, [env if env is not None else os.environ])[0]


def run_together(count: int, module: str, *words: str) -> None:
    """Run a module in several processes with the environment variables that torchrun sets.

    If one of them fails, the others are killed, and its output is raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common = ONE_THREAD | address | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    envs = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    for done in _run(module, words, REPOSITORY, envs):
        assert done.returncode == 0, done.stdout + done.stderr


def _run(
    module: str, words: Sequence[str], cwd: Path, envs: Sequence[Mapping[str, str]]
) -> list["subprocess.CompletedProcess[str]"]:
    """Run one process per environment, all at once."""
    with tempfile.TemporaryDirectory() as folder, _ONE_AT_A_TIME:
        server, places = _server(), [Path(folder) / str(number) for number in range(len(envs))]
        assert server.stdin is not None
        assert server.stdout is not None
        common = {"module": module, "words": words, "cwd": str(cwd)}
        jobs = [common | {"env": dict(env), "place": str(place)} for env, place in zip(envs, places, strict=True)]
        server.stdin.write(json.dumps(jobs) + "\n")
        server.stdin.flush()
        return [
            subprocess.CompletedProcess(
                [module, *words], code, place.with_suffix(".out").read_text(), place.with_suffix(".err").read_text()
            )
            for place, code in zip(places, json.loads(server.stdout.readline()), strict=True)
        ]


@functools.cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.preloaded"]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Run the jobs of one line of standard input at once, and print their exit codes."""
    for line in sys.stdin:
        jobs = json.loads(line)
        for name in IMPORTS.get(jobs[0]["module"], ()):
            importlib.import_module(name)
        gc.freeze()  # a garbage collection in a fork would visit, and so copy, all imported objects
        codes: dict[int, int | None] = {}
        for job in jobs:
            pid = os.fork()
            if not pid:
                _become(job)
            codes[pid] = None
        while None in codes.values():
            pid, status = os.waitpid(-1, 0)
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                for other in [pid for pid, code in codes.items() if code is None]:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(list(codes.values())), flush=True)
    gc.unfreeze()


def _become(job: Mapping[str, object]) -> None:
    """Run a job in this process, and end it."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{job['place']}.out", _NEW),
        (2, f"{job['place']}.err", _NEW),
    ):
        os.dup2(os.open(name, flags), number)
    os.chdir(str(job["cwd"]))
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = ["", *job["words"]]
    code: object = 0
    try:
        runpy.run_module(str(job["module"]), run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    threading._shutdown()  # as at the end of the interpreter, which would also visit all imported objects
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


if __name__ == "__main__":
    _serve()
