"""Progress on stderr: bars in a terminal, else a line every minute."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")
LINE_INTERVAL = 60.0  # seconds
LONGEST = 1e10  # seconds, which datetime can express


def track(iterable: Iterable[Item], description: str, total: int | None = None, done: int = 0) -> Iterator[Item]:
    """Yield the items and show a progress bar, on rank 0 only. Nested bars are stacked; a finished bar disappears.

    Without a terminal, as in a stage of a flow, a line with the estimated remaining time is printed every minute.

    Args:
        iterable: The items.
        description: Text of the bar.
        total: Number of items including `done`; None if unknown.
        done: Items finished earlier; they do not count for the estimate of the remaining time.

    Yields:
        The items, unchanged.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from iterable
        return
    if not sys.stderr.isatty():
        yield from _lines(iterable, description, total, done)
        return
    with Progress(console=_stderr(), transient=True) as progress:
        yield from progress.track(iterable, total=total, completed=done, description=description)


def _lines(iterable: Iterable[Item], description: str, total: int | None, done: int) -> Iterator[Item]:
    started = printed = time.monotonic()
    for number, item in enumerate(iterable):
        now = time.monotonic()
        if number and now - printed >= LINE_INTERVAL:
            position, printed = f"{done + number}" + (f" of {total}" if total else ""), now
            left = (now - started) / number * (total - done - number) if total else None
            rest = "" if left is None else f", about {timedelta(seconds=round(min(left, LONGEST)))} left"
            print(f"{description}: {position}{rest}", file=sys.stderr, flush=True)
        yield item


@cache
def _stderr() -> Console:
    """One console for all bars: rich stacks the bars of one console only."""
    return Console(stderr=True)
