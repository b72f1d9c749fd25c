"""Compute the sparsity of every cycle of a gradual schedule."""

import itertools
import math
from collections.abc import Mapping, Sequence

from vitprune.errors import BadInput

SHAPES = ("linear", "cubic")


def sparsities(
    final: float, cycles: int, shape: str = "cubic", initial: float | None = None, steps: Sequence[float] | None = None
) -> list[float]:
    """Sparsity after each cycle; the last is `final`.

    linear: final * x; cubic: final * (1 - (1 - x)^3), which removes most while much is left. x runs over 1/n, ..., 1:
    the dense model is where it starts, and no cycle. With `initial`, the first cycle removes that much, x runs over
    0, 1/(n - 1), ..., 1 and what is said of `final` holds of what lies between. `steps` says it all itself.

    Raises:
        BadInput: an unknown shape, no cycle, or an initial sparsity or steps that do not end at `final`.

    Source: Zhu & Gupta 2017, equation 1 (cubic), whose ends are both included, as with CAP's recipes.
    """
    if shape not in SHAPES:
        raise BadInput(f"schedule {shape!r}: unknown; use one of {', '.join(SHAPES)}")
    if cycles < 1:
        raise BadInput(f"cycles {cycles}: at least one is needed")
    if steps is not None:
        return _checked(list(steps), final, cycles)
    if initial is None:
        return [final * _gone(k / cycles, shape) for k in range(1, cycles + 1)]
    if cycles < 2 or initial > final:
        raise BadInput(f"prune.schedule.initial {initial:g}: give 2 cycles or more, and no more than {final:g}")
    return [initial + (final - initial) * _gone(k / (cycles - 1), shape) for k in range(cycles)]


def _gone(x: float, shape: str) -> float:
    left = 1 - x
    return 1 - (left if shape == "linear" else left**3)


def _checked(steps: list[float], final: float, cycles: int) -> list[float]:
    if len(steps) != cycles:
        raise BadInput(f"prune.cycles {cycles}: prune.schedule.steps has {len(steps)}; give the same number")
    if steps != sorted(steps):
        raise BadInput(f"prune.schedule.steps: {steps} falls; what is gone stays gone, so give them in order")
    if not math.isclose(steps[-1], final, abs_tol=1e-9):
        raise BadInput(f"prune.schedule.steps: ends at {steps[-1]:g}, but {final:g} is to go; give the same")
    return [*steps[:-1], final]


def spans(starts: Mapping[int, float] | None, cycles: int, last: int) -> list[int]:
    """Epochs of training after each cycle, where `starts` has the epoch of the run at which each one prunes.

    The last cycle trains for `last` epochs, and so do all without `starts`.

    Raises:
        BadInput: the first is not at epoch 0, or they are not in order.
    """
    if starts is None:
        return [last] * cycles
    epochs = list(starts)
    if epochs[:1] != [0] or epochs != sorted(epochs):
        raise BadInput(f"prune.schedule.steps: prunes at epochs {epochs}; begin with 0 and give them in order")
    return [after - before for before, after in itertools.pairwise(epochs)] + [last]
