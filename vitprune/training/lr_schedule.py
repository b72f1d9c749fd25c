"""Compute the learning rate of a training step."""

import math

from vitprune.errors import BadInput

DECAYS = ("cosine", "linear")


def learning_rate(step: int, steps: int, high: float, low: float, warmup: int = 0, decay: str = "cosine") -> float:
    """Learning rate of one step of so many: a linear warm-up from 0, then the fall from `high` to `low`.

    linear: high - (high - low) * step / (steps - 1), which is `low` at the last step; cosine: low + (high - low) *
    (1 + cos(pi * step / steps)) / 2, which would be `low` one step later. The fall is counted from step 0, under the
    warm-up; without one, the first step has the full rate.

    Raises:
        BadInput: the fall is unknown.
    """
    if decay not in DECAYS:
        raise BadInput(f"decay {decay!r}: unknown; use one of {', '.join(DECAYS)}")
    if step < warmup:
        return high * step / warmup
    if step >= steps:
        return low
    if decay == "linear":
        return high - (high - low) * step / max(1, steps - 1)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * step / steps))
