"""Format numbers of the report with units, signs and thin spaces; the exact value is kept with the text."""

import math
from dataclasses import dataclass

ABSENT = "\N{EN DASH}"
_GAP = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Quantity:
    """A number of the report: dotted name, exact value and text."""

    name: str
    value: float | None
    text: str

    @property
    def exact(self) -> str:
        """The value in full precision; empty if there is none."""
        return "" if self.value is None else repr(self.value)


def finite(value: object) -> float | None:
    """Return the value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def fixed(name: str, value: float | None, decimals: int) -> Quantity:
    """Format a number with a fixed number of decimals: 97.80."""
    text = ABSENT if value is None else f"{value:.{decimals}f}".replace("-", _MINUS)
    return Quantity(name, value, text)


def si_count(name: str, value: float | None) -> Quantity:
    """Format a count in full below 1,000, else with three digits and an SI prefix: 5.72 M."""
    if value is None:
        return Quantity(name, None, ABSENT)
    for factor, unit in _UNITS:
        if abs(value) >= factor * 0.9995:
            return Quantity(name, value, f"{three_digits(value / factor)}{_GAP}{unit}")
    return Quantity(name, value, f"{value:.0f}")


def grouped(name: str, value: float | None) -> Quantity:
    """Format a count in full, with thin spaces between thousands: 1 797."""
    text = ABSENT if value is None else f"{value:,.0f}".replace(",", _GAP)
    return Quantity(name, value, text)


def three_digits(value: float) -> str:
    """Format a value with three significant digits and without exponent."""
    size = abs(value)
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{decimals}f}"


def signed(name: str, value: float | None, decimals: int, unit: str = "") -> Quantity:
    """Format a difference with its sign: -0.56; zero has none."""
    if value is None:
        return Quantity(name, None, ABSENT)
    text = f"{abs(value):.{decimals}f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else _MINUS
    return Quantity(name, value, f"{sign}{text}{_GAP + unit if unit else ''}")


def relative_change(name: str, before: float | None, after: float | None) -> Quantity:
    """Format the change from `before` to `after` in percent of `before`: -57.1 %."""
    if before is None or after is None or before == 0:
        return Quantity(name, None, ABSENT)
    return signed(name, 100 * (after - before) / before, 1, "%")
