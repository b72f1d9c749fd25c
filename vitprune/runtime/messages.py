"""Text of messages to the user."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HUB = "huggingface_hub"


class Note(str):
    """A message about what a check could not prove; it is no difference."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def without_retry_lines() -> Iterator[None]:
    """Hide the warnings of huggingface_hub about repeated requests, as the error of the last one is reported."""
    logger = logging.getLogger(HUB)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
