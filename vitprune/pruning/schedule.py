"""Sparsity after every cycle of a gradual schedule."""

import itertools
import math
from collections.abc import Mapping, Sequence

from vitprune.errors import BadInput

SHAPES = ("linear", "cubic")


def sparsities(
    final: float, cycles: int, shape: str = "cubic", initial: float | None = None, steps: Sequence[float] | None = None
) -> list[float]:
    """Return the sparsity after each cycle; the last is `final`.

    With x = 1/n, ..., 1 over n cycles: linear: final * x; cubic: final * (1 - (1 - x)^3), which removes most at the
    start.

    Args:
        final: Sparsity after the last cycle.
        cycles: Number of cycles.
        shape: linear or cubic.
        initial: Sparsity after the first cycle. x then is 0, 1/(n - 1), ..., 1 between `initial` and `final`.
        steps: The sparsity of every cycle, instead of a shape.

    Raises:
        BadInput: the shape is unknown, the number of cycles is 0, or `initial` or `steps` do not fit the number of
            cycles or do not end at `final`.

    Source: Zhu & Gupta 2017, equation 1 (cubic). CAP's recipes include both ends.
    """
    if shape not in SHAPES:
        raise BadInput(f"schedule {shape!r}: unknown; use one of {', '.join(SHAPES)}")
    if cycles < 1:
        raise BadInput(f"cycles {cycles}: at least one is needed")
    if steps is not None:
        return _checked_steps(list(steps), final, cycles)
    if initial is None:
        return [final * _progress(k / cycles, shape) for k in range(1, cycles + 1)]
    if cycles < 2 or initial > final:
        raise BadInput(f"prune.schedule.initial {initial:g}: give 2 cycles or more, and no more than {final:g}")
    return [initial + (final - initial) * _progress(k / (cycles - 1), shape) for k in range(cycles)]


def _progress(x: float, shape: str) -> float:
    rest = 1 - x
    return 1 - (rest if shape == "linear" else rest**3)


def _checked_steps(steps: list[float], final: float, cycles: int) -> list[float]:
    if len(steps) != cycles:
        raise BadInput(f"prune.cycles {cycles}: prune.schedule.steps has {len(steps)}; give the same number")
    if steps != sorted(steps):
        raise BadInput(f"prune.schedule.steps: {steps} decreases; sort them in ascending order")
    if not math.isclose(steps[-1], final, abs_tol=1e-9):
        raise BadInput(f"prune.schedule.steps: ends at {steps[-1]:g}, the target sparsity is {final:g}; give the same")
    return [*steps[:-1], final]


def epochs_per_cycle(starts: Mapping[int, float] | None, cycles: int, last: int) -> list[int]:
    """Return the epochs of training after each cycle.

    Args:
        starts: Epochs of the whole run at which the cycles prune (keys); None: every cycle trains for `last` epochs.
        cycles: Number of cycles.
        last: Epochs after the last cycle.

    Raises:
        BadInput: the first epoch is not 0, or they are not in order.
    """
    if starts is None:
        return [last] * cycles
    epochs = list(starts)
    if epochs[:1] != [0] or epochs != sorted(epochs):
        raise BadInput(f"prune.schedule.steps: prunes at epochs {epochs}; begin with 0 and sort them")
    return [after - before for before, after in itertools.pairwise(epochs)] + [last]
