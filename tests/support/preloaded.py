"""Run a module's command line in a fork of a process that has already imported what the module needs.

Each fork is a process of its own, with its own arguments, environment, working directory and exit code. It saves the
imports, which take longer than most of the commands themselves. A test that needs a new interpreter starts one itself.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STORE = "mlflow.store.tracking.sqlalchemy_store"
IMPORTS = {
    "dvc": ("dvc.cli.parser",),
    "vitprune.cli": ("vitprune.pipeline.verify", STORE),
    "vitprune.orchestration.execution.isolated": (STORE,),
    "tests.support.read_mlflow": (STORE,),
}
_ONE_AT_A_TIME = threading.Lock()


def run(
    module: str, *words: str, cwd: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `python -W ignore -m MODULE WORDS...` and capture its output."""
    with tempfile.TemporaryDirectory() as folder, _ONE_AT_A_TIME:
        out, err = Path(folder) / "out", Path(folder) / "err"
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        files = {"out": str(out), "err": str(err), "cwd": str(cwd)}
        job = {"module": module, "words": words, "env": dict(env if env is not None else os.environ)} | files
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([module, *words], code, out.read_text(), err.read_text())


@functools.cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.preloaded"]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Run one job per line of standard input; print its exit code."""
    for line in sys.stdin:
        job = json.loads(line)
        for name in IMPORTS.get(job["module"], ()):
            importlib.import_module(name)
        pid = os.fork()
        if not pid:
            _become(job)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(job: Mapping[str, object]) -> None:
    """Run a job in this process, and end it."""
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, job["out"], _NEW), (2, job["err"], _NEW)):
        os.dup2(os.open(str(name), flags), number)
    os.chdir(str(job["cwd"]))
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = ["", *job["words"]]
    runpy.run_module(str(job["module"]), run_name="__main__", alter_sys=True)
    sys.exit()


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


if __name__ == "__main__":
    _serve()
