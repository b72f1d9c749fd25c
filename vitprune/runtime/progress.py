"""A progress bar on stderr for what takes long, and nothing at all where stderr is not a terminal."""

import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def track(iterable: Iterable[Item], description: str, total: int | None = None, done: int = 0) -> Iterator[Item]:
    """Yield the items unchanged while a bar shows how far they are; bars stack, and each goes away at its end.

    `done` of the total were done before: they count as done, but not in the speed from which the rest is guessed. Of
    several processes, only the first shows bars.
    """
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield from iterable
        return
    with Progress(console=_stderr(), transient=True) as progress:
        yield from progress.track(iterable, total=total, completed=done, description=description)


@cache
def _stderr() -> Console:
    """One console for all bars: rich stacks the bars of one console, and those of two overwrite each other."""
    return Console(stderr=True)
