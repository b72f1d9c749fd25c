"""A progress bar on stderr for what takes long, and nothing at all where stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

Item = TypeVar("Item")


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items unchanged while a bar shows how far they are; the bar goes away at the end."""
    if not sys.stderr.isatty():
        yield from iterable
        return
    yield from rich.progress.track(iterable, description, total=total, console=Console(stderr=True), transient=True)
