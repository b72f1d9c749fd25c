"""Limits for building a model from untrusted arguments: tensor operations and CPU time."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MAX_OPERATIONS = 20_000  # tensor operations to build a model; the largest of timm need 5,000
MAX_SECONDS = 10.0  # CPU time to build a model on the meta device; the largest of timm need 2


class BuildLimitError(Exception):
    """Building a model exceeds a limit."""


class LimitedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Limit the number of tensor operations: a depth in config.json is a loop in timm."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._count += 1
        if self._count > MAX_OPERATIONS:
            raise BuildLimitError(f"more than {MAX_OPERATIONS} operations; no timm model needs so many")
        if args and isinstance(args[0], Tensor) and args[0].is_meta and function._schema.name.endswith("_"):
            return args[0]  # meta tensors: in-place operations have no effect
        return function(*args, **(kwargs or {}))


@contextmanager
def limited_cpu_time(seconds: float) -> Iterator[None]:
    """Raise BuildLimitError in this thread when it has used its CPU time: for loops of Python, which run no operation.

    The time is that of the thread, so other load on the machine does not count.
    """
    thread, over = threading.get_ident(), threading.Event()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + seconds
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(1.0 if over.is_set() else 0.1):  # again if timm catches the exception
            if time.clock_gettime(clock) > end:
                over.set()
                _raise_in(thread, BuildLimitError)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BuildLimitError:
        if over.is_set():
            raise BuildLimitError(f"more than {seconds:g} s of CPU time; no timm model needs so much") from None
        raise
    finally:
        finished.set()
        watcher.join()
        _raise_in(thread, None)  # a limit that was reached after the last instruction


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise an exception in a thread before its next instruction, or clear a pending one."""
    argument = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), argument)
