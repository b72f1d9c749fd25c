"""Sparsity over the cycles of a gradual run, as plain values."""

from vitprune.errors import BadInput

SHAPES = ("linear", "cubic")


def sparsities(final: float, cycles: int, shape: str = "cubic") -> list[float]:
    """Sparsity after each cycle; the last is `final`.

    linear: final * k / n; cubic: final * (1 - (1 - k / n)^3), which removes most while much is left.

    Source: Zhu & Gupta 2017, equation 1 (cubic).
    """
    if shape not in SHAPES:
        raise BadInput(f"schedule {shape!r}: unknown; use one of {', '.join(SHAPES)}")
    if cycles < 1:
        raise BadInput(f"cycles {cycles}: at least one is needed")
    left = [1 - k / cycles for k in range(1, cycles + 1)]
    return [final * (1 - (part if shape == "linear" else part**3)) for part in left]
