"""The elimination of greedy.py for one CPU thread, compiled by numba: plain loops over one block after the other.

A block's weights are reordered as they go, so that those that are left lie behind those that are gone: each step then
touches the former alone, a third of the work of keeping all. Import this module only where numba is there; compiled
code is kept beside this file.
"""

from math import inf, sqrt
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]

LEAST = 1e-300  # of a conditional variance that rounding has eaten up


@njit(cache=True, nogil=True)
def eliminate_all(
    inverse: Array, weights: Array, losses: Array, blocks: Array, cap: int, limit: float, keep: int, every: int
) -> None:
    """Fill losses (all, B) of the `blocks`, Python's lock let go of; `every` is 0 where no run has a limit."""
    size = weights.shape[1]
    factor = np.empty((size, size))  # rows: steps; columns: weights in their present order
    state = np.empty((3, size))  # weights, conditional variances, a row of the inverse
    order, lost = np.empty(size, np.int64), np.empty(size, np.int64)
    for block in blocks:
        count = _begin(inverse[block], weights[block], losses[block], state, order, lost, every)
        level, gone = 0.0, size - count
        for step in range(count):
            if gone + step >= cap and level >= limit:
                break
            at = _cheapest(state[0], state[1], step, count, order, lost, every - keep, every)
            if at < 0:
                break
            cost = state[0, at] ** 2 / state[1, at]
            level = max(level + cost / 2, np.nextafter(level, inf))
            _swap(factor, state, order, step, at)
            losses[block, order[step]] = level
            if every:
                lost[order[step] // every] += 1
            _remove(inverse[block, order[step]], factor, state, order, step, count)


@njit(cache=True, nogil=True)
def _begin(h: Array, weights: Array, losses: Array, state: Array, order: Array, lost: Array, every: int) -> int:
    """Line up the weights that are there; those that are zero have gone at no loss. Returns how many there are."""
    count = 0
    lost[:] = 0
    for q in range(len(weights)):
        there = weights[q] != 0.0
        losses[q] = inf if there else 0.0
        if there:
            order[count], state[0, count], state[1, count] = q, weights[q], h[q, q]
            count += 1
        elif every:
            lost[q // every] += 1
    return count


@njit(cache=True, nogil=True)
def _cheapest(w: Array, d: Array, step: int, count: int, order: Array, lost: Array, most: int, every: int) -> int:
    """Place of the weight that costs least, -1 where none may go."""
    best, at = inf, -1
    for j in range(step, count):
        if w[j] * w[j] < best * d[j] and (every == 0 or lost[order[j] // every] < most):
            best, at = w[j] * w[j] / d[j], j
    return at


@njit(cache=True, nogil=True)
def _swap(factor: Array, state: Array, order: Array, step: int, at: int) -> None:
    """Put what goes before what is left."""
    order[step], order[at] = order[at], order[step]
    for line in range(2):
        state[line, step], state[line, at] = state[line, at], state[line, step]
    for line in range(step):
        factor[line, step], factor[line, at] = factor[line, at], factor[line, step]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _remove(h: Array, factor: Array, state: Array, order: Array, step: int, count: int) -> None:
    """The next row of the factor, and what it does to the weights and variances that are left."""
    left = count - step - 1
    w, d, row, places = state[0, step + 1 :], state[1, step + 1 :], state[2, step + 1 :], order[step + 1 :]
    for j in range(left):
        row[j] = h[places[j]]
    line = 0
    while line + 4 <= step:  # four at a time: the sums stay in registers
        a0, a1 = factor[line, step], factor[line + 1, step]
        a2, a3 = factor[line + 2, step], factor[line + 3, step]
        f0, f1 = factor[line, step + 1 :], factor[line + 1, step + 1 :]
        f2, f3 = factor[line + 2, step + 1 :], factor[line + 3, step + 1 :]
        for j in range(left):
            row[j] -= a0 * f0[j] + a1 * f1[j] + a2 * f2[j] + a3 * f3[j]
        line += 4
    while line < step:
        a0, f0 = factor[line, step], factor[line, step + 1 :]
        for j in range(left):
            row[j] -= a0 * f0[j]
        line += 1
    pivot = 1 / sqrt(state[1, step])
    share, own = state[0, step] * pivot, factor[step, step + 1 :]
    for j in range(left):
        own[j] = row[j] * pivot
        d[j] = max(d[j] - own[j] * own[j], LEAST)
        w[j] -= share * own[j]
