"""Progress bars on stderr; none if stderr is not a terminal."""

import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def track(iterable: Iterable[Item], description: str, total: int | None = None, done: int = 0) -> Iterator[Item]:
    """Yield the items and show a progress bar, on rank 0 only. Nested bars are stacked; a finished bar disappears.

    Args:
        iterable: The items.
        description: Text of the bar.
        total: Number of items including `done`; None if unknown.
        done: Items finished earlier; they do not count for the estimate of the remaining time.

    Yields:
        The items, unchanged.
    """
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield from iterable
        return
    with Progress(console=_stderr(), transient=True) as progress:
        yield from progress.track(iterable, total=total, completed=done, description=description)


@cache
def _stderr() -> Console:
    """One console for all bars: rich stacks the bars of one console only."""
    return Console(stderr=True)
