"""A progress bar on stderr for what takes long, and nothing at all where stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items unchanged while a bar shows how far they are; bars stack, and each goes away at its end."""
    if not sys.stderr.isatty():
        yield from iterable
        return
    with Progress(console=_stderr(), transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)


@cache
def _stderr() -> Console:
    """One console for all bars: rich stacks the bars of one console, and those of two overwrite each other."""
    return Console(stderr=True)
