"""Parse and format costs such as 600M, 1.26G or 20, and durations such as 3min."""

import math
import re

SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9}
QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?\s*([KMG]?)", re.ASCII)
SECONDS = {"s": 1, "min": 60, "h": 3600}
DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(s|min|h)", re.ASCII)
EXPECTED = "a fraction, a whole number, or one with K, M or G (600M)"

Quantity = float | str  # as in params.yaml and in Python


def number_of(quantity: Quantity) -> float:
    """Convert a quantity to a number: 600M is 600,000,000.

    Raises:
        ValueError: it is neither a finite number nor the text of one. The message does not name the key.
    """
    if isinstance(quantity, str):
        match = QUANTITY.fullmatch(quantity.strip())
        if match is None:
            raise ValueError(f"{quantity!r} is no quantity; give {EXPECTED}")
        quantity = float(f"{match[1]}e{match[2] or 0}") * SUFFIXES.get(match[3], 1.0)
    if isinstance(quantity, bool) or not isinstance(quantity, int | float) or not math.isfinite(quantity):
        raise ValueError(f"{quantity!r} is no quantity; give {EXPECTED}")
    return float(quantity)


def seconds_of(duration: Quantity) -> float:
    """Convert a duration to seconds: 3min is 180, and so is the number 180.

    Raises:
        ValueError: it is neither a positive number of seconds nor the text of a duration.
    """
    value: object = duration
    if isinstance(duration, str):
        match = DURATION.fullmatch(duration.strip())
        value = float(match[1]) * SECONDS[match[2]] if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{duration!r} is no duration; give seconds, or a number with s, min or h (3min)")
    return float(value)


def format_cost(number: float) -> str:
    """Format a number with four digits, and with K, M or G from ten thousand on."""
    for suffix, size in reversed(SUFFIXES.items()):
        if number >= max(size, 1e4) * (1 - 1e-9):
            return f"{number / size:.4g}{suffix}"
    return f"{number:.4g}"
