"""Limits for building a model from untrusted arguments: tensor operations, and time and memory of a child process."""

import math
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if sys.platform != "win32":
    import resource

MAX_OPERATIONS = 20_000  # tensor operations to build a model; the largest of timm need 5,000
MAX_SECONDS = 10.0  # CPU time to build a model on the meta device; the largest of timm need 2
MAX_MEMORY = 1 << 30  # bytes to build a model on the meta device; the largest of timm need 100 MiB
COMPLETE = b"complete"
ATTEMPTS, POLL_SECONDS = 10, 0.1
ASLEEP_POLLS = 15  # in a row, after which a child is taken to wait for a lock that no thread of it will release


class BuildLimitError(Exception):
    """Building a model exceeds a limit, or fails."""


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


def try_in_child(build: Callable[[], object], seconds: float) -> None:
    """Run a function in a forked process with limits on memory and CPU time, and discard its result.

    Loops of Python run no tensor operation, and a single call into C cannot be interrupted, so a process is the only
    bound that holds for all arguments. It is a fork, which takes milliseconds; it touches neither GPU nor files.
    A fork copies the locks that other threads hold at that moment, but not the threads. A child that waits for one is
    killed, and the function is tried again. Without `fork` (Windows), nothing is tried.

    Args:
        build: The function.
        seconds: CPU time.

    Raises:
        BuildLimitError: it exceeds a limit, or raises an error.
    """
    if sys.platform == "win32":
        return
    for _ in range(ATTEMPTS):
        answer, status = _forked(build, seconds)
        if answer is not None:
            break
    else:
        raise BuildLimitError("it waits for a lock of another thread; load the model before other threads start")
    if answer == COMPLETE:
        return
    if answer:
        raise BuildLimitError(answer.decode("utf-8", "replace"))
    if os.WTERMSIG(status) == signal.SIGXCPU:
        raise BuildLimitError(f"more than {seconds:g} s of CPU time; no timm model needs so much")
    raise BuildLimitError(f"more than {MAX_MEMORY >> 20} MiB of memory, or a crash; no timm model needs so much")


def _forked(build: Callable[[], object], seconds: float) -> tuple[bytes | None, int]:
    """Run a function in a child; return its answer, None if it waited for a lock, and the status of its end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork next to threads
        child = os.fork()
    if child == 0:
        _run_and_exit(build, writing, seconds)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = _answer(pipe, child, 20 * seconds + 20)
    os.kill(child, signal.SIGKILL)  # no effect after its end
    return answer, os.waitpid(child, 0)[1]


def _answer(pipe: IO[bytes], child: int, seconds: float) -> bytes | None:
    """Return what a child writes before it ends, at most `seconds` of wall time later; None if it only sleeps."""
    asleep, deadline = 0, time.monotonic() + seconds
    while not select.select([pipe], [], [], POLL_SECONDS)[0]:
        asleep = asleep + 1 if _is_asleep(child) else 0
        if asleep >= ASLEEP_POLLS:
            return None
        if time.monotonic() > deadline:
            return f"more than {seconds:g} s on this machine; no timm model needs so much".encode()
    return pipe.read()


def _is_asleep(process: int) -> bool:
    """Whether a process waits for something other than a CPU or a disk; False where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"S"
    except OSError:
        return False


def _run_and_exit(build: Callable[[], object], writing: int, seconds: float) -> NoReturn:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of C++ about failed allocations
        _lower(resource.RLIMIT_CORE, 0)
        _lower(resource.RLIMIT_CPU, math.ceil(seconds))
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + MAX_MEMORY)
        build()
        answer = COMPLETE
    except MemoryError:
        answer = f"more than {MAX_MEMORY >> 20} MiB of memory; no timm model needs so much".encode()
    except BaseException as error:
        answer = (" ".join(str(error).split()) or type(error).__name__)[:200].encode("utf-8", "replace")
    os.write(writing, answer)
    os._exit(0)


def _lower(limit: int, value: int) -> None:
    soft, hard = resource.getrlimit(limit)
    bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(limit, (min([value, *bounds]), hard))
