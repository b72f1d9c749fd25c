"""Run a function in a child process with limits of time and memory."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from vitprune.runtime.messages import first_line


def run_limited(function: Callable[..., Any], *args: Any, seconds: float, gigabytes: float) -> Any:
    """Return the result of a function that runs in a child process, or a string that says how it ended.

    Args:
        function: The function; its result is sent as JSON-like values.
        args: Its arguments.
        seconds: Limit of wall time.
        gigabytes: Limit of address space.
    """
    context = multiprocessing.get_context("fork")  # the libraries are imported already
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(writer, function, args, gigabytes))
    child.start()
    writer.close()
    try:
        if not reader.poll(seconds):
            return f"not finished in {seconds:.0f} s"
        return reader.recv()
    except EOFError:
        child.join()
        return f"ends with exit code {child.exitcode}"
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def _work(writer: Connection, function: Callable[..., Any], args: tuple[Any, ...], gigabytes: float) -> None:
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    torch.set_num_threads(1)
    try:
        writer.send(function(*args))
    except Exception as error:  # what ends one model must not end the table
        writer.send(f"{type(error).__name__}: {first_line(error)}")
    writer.close()
