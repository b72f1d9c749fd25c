"""Prefect's embedded server: a child process in a group of its own that ends with the process that started it."""

import atexit
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable

from vitprune.errors import BadInput

EXCEPTION = re.compile(r"^[\w.]+: \S.*", re.MULTILINE)  # the last line of a traceback
START_SECONDS, END_SECONDS = 120.0, 5.0
ENVIRONMENT = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def start_server() -> tuple[str, Callable[[], None]]:
    """Start a server for this process, with the database of PREFECT_HOME.

    The flow needs its server until it has ended, so a signal to the group of the caller (Ctrl-C in a terminal,
    `timeout`, systemd) does not reach it. It ends when its standard input is closed, at exit or because the caller was
    killed.

    Returns:
        The address for PREFECT_API_URL, and a function that waits until the server answers and raises BadInput if it
        does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryFile() as errors:
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "vitprune.orchestration.embedded_server", str(number)],
            env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
            pass_fds=[number], process_group=0,
        )  # fmt: skip
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        log = os.dup(errors.fileno())
    atexit.register(_end, process)

    def wait() -> None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=START_SECONDS).close()
        except OSError as error:
            _end(process)
            os.lseek(log, 0, os.SEEK_SET)
            raised = EXCEPTION.findall(os.read(log, 1 << 20).decode(errors="replace")) or [str(error)]
            raise BadInput(f"Prefect's embedded server did not start ({raised[-1]}); run again") from None
        finally:
            os.close(log)

    return address, wait


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(listener: socket.socket) -> None:
    """Serve Prefect's API on a listening socket until standard input is closed."""
    import uvicorn

    app = "prefect.server.api.server:create_app"
    config = uvicorn.Config(app, factory=True, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)

    def end_with_the_parent() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock an exit for another reason would wait for
        server.should_exit = True

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
