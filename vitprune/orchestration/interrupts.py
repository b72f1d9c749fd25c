"""Ctrl-C and SIGTERM in the process of a flow: one line at once, exit code 130, and no traceback."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import psutil  # type: ignore[import-untyped]

from vitprune.orchestration.execution.processes import kill_tree

EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_SECONDS = 30.0  # from the end of the body to the end of its process


def run_interruptibly(body: Callable[[Callable[[], bool]], int], line: str) -> int:
    """Run the body of a command until it ends, or until the first Ctrl-C or SIGTERM.

    The first signal prints `line` and raises KeyboardInterrupt in the body. A second Ctrl-C kills all processes of the
    command and ends it at once; a further SIGTERM changes nothing. After the body, the process ends within
    EXIT_SECONDS: if its server has ended, Prefect waits without a limit. Signals then leave the exit code as it is:
    Ctrl-C ends the process at once, SIGTERM changes nothing.

    Args:
        body: Gets a function that returns whether a signal has been received; returns an exit code.
        line: Says how to continue.

    Returns:
        The body's exit code; 130 after a signal.
    """
    received: list[int] = []
    ended: list[int] = []  # the exit code, once the body has ended

    def handle(number: int, frame: FrameType | None) -> None:
        if ended:
            if number == signal.SIGINT:
                _end_now(ended[0])
            return
        received.append(number)
        if len(received) == 1:
            os.write(2, f"\n{line}\n".encode())  # print() is not reentrant
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            _end_now(EXIT_INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    code = 1
    try:
        code = body(lambda: bool(received))
    except BaseException:  # of Prefect too, which may turn the interrupt into an exception of its own
        if not received:
            raise
    finally:
        code = EXIT_INTERRUPTED if received else code
        ended.append(code)
        watchdog = threading.Timer(EXIT_SECONDS, _end_now, [code])
        watchdog.daemon = True
        watchdog.start()
    return code


def _end_now(code: int) -> None:
    for child in psutil.Process().children():
        kill_tree(child.pid)
    os._exit(code)
