"""Costs as people write and read them: 600M, 1.26G, 20."""

import math
import re

SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9}
QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?\s*([KMG]?)", re.ASCII)
MEANT = "a fraction, a whole number, or one with K, M or G (600M)"

Quantity = float | str  # as in params.yaml and in Python


def number_of(quantity: Quantity) -> float:
    """The number that is meant: 600M is 600,000,000.

    Raises:
        ValueError: it is neither a finite number nor text that says one; the message has no name of a key.
    """
    if isinstance(quantity, str):
        found = QUANTITY.fullmatch(quantity.strip())
        if found is None:
            raise ValueError(f"{quantity!r} is no quantity; give {MEANT}")
        quantity = float(f"{found[1]}e{found[2] or 0}") * SUFFIXES.get(found[3], 1.0)
    if isinstance(quantity, bool) or not isinstance(quantity, int | float) or not math.isfinite(quantity):
        raise ValueError(f"{quantity!r} is no quantity; give {MEANT}")
    return float(quantity)


def parse_cost(quantity: Quantity) -> Quantity:
    """The number that text says; text that says none as it is."""
    try:
        return number_of(quantity) if isinstance(quantity, str) else quantity
    except ValueError:
        return quantity


def format_cost(number: float) -> str:
    """A number to read: four digits, with K, M or G from ten thousand on."""
    for suffix, size in reversed(SUFFIXES.items()):
        if number >= max(size, 1e4) * (1 - 1e-9):
            return f"{number / size:.4g}{suffix}"
    return f"{number:.4g}"
