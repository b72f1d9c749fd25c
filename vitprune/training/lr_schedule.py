"""Learning-rate schedule: linear warm-up, then cosine or linear decay."""

import math

from vitprune.errors import BadInput

DECAYS = ("cosine", "linear")


def learning_rate(step: int, steps: int, high: float, low: float, warmup: int = 0, decay: str = "cosine") -> float:
    """Return the learning rate of one step: linear warm-up from 0, then decay from `high` to `low`.

    linear: high - (high - low) * step / (steps - 1), which is `low` at the last step.
    cosine: low + (high - low) * (1 + cos(pi * step / steps)) / 2, which would be `low` one step after the last.
    The decay starts at step 0, also with a warm-up.

    Args:
        step: Step, from 0.
        steps: Number of steps.
        high: Peak learning rate.
        low: Final learning rate.
        warmup: Number of warm-up steps.
        decay: "cosine" or "linear".

    Returns:
        The learning rate.

    Raises:
        BadInput: unknown decay.
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
