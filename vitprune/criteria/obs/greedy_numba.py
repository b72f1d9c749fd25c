"""The elimination of greedy.py on one CPU thread, compiled by numba, one block after the other.

Weights are reordered so that the remaining ones are contiguous and each step touches only them, which is a third of
the work. Import this module only if numba is installed; compiled code is cached next to this file.
"""

from math import inf, sqrt
from typing import Any

import numpy as np
from numba import njit

from vitprune.criteria.obs.greedy import MIN_VARIANCE

Array = np.ndarray[Any, Any]


@njit(cache=True, nogil=True)
def eliminate_blocks(inverse: Array, weights: Array, losses: Array, blocks: Array, keep: int, every: int) -> None:
    """Fill losses (all, B) of the given blocks without holding the GIL; `every` = 0 disables the N:M limit.

    `inverse` is (all, B, B), or (1, B, B) if the blocks share one.
    """
    size = weights.shape[1]
    factor = np.empty((size, size))  # rows: steps; columns: weights in their current order
    state = np.empty((3, size))  # weights, conditional variances, a row of the inverse
    order, lost = np.empty(size, np.int64), np.empty(size, np.int64)
    for block in blocks:
        h = inverse[block if len(inverse) > 1 else 0]
        count = collect_nonzero(h, weights[block], losses[block], state, order, lost, every)
        level = 0.0
        for step in range(count):
            index = cheapest_weight(state[0], state[1], step, count, order, lost, every - keep, every)
            if index < 0:
                break
            cost = state[0, index] ** 2 / state[1, index]
            level = max(level + cost / 2, np.nextafter(level, inf))
            _swap(factor, state, order, step, index)
            losses[block, order[step]] = level
            if every:
                lost[order[step] // every] += 1
            _remove(h[order[step]], factor, state, order, step, count)


@njit(cache=True, nogil=True)
def collect_nonzero(
    h: Array, weights: Array, losses: Array, state: Array, order: Array, lost: Array, every: int
) -> int:
    """Collect the nonzero weights of a block; zero weights get loss 0. Return the number of nonzero weights."""
    count = 0
    lost[:] = 0
    for q in range(len(weights)):
        nonzero = weights[q] != 0.0
        losses[q] = inf if nonzero else 0.0
        if nonzero:
            order[count], state[0, count], state[1, count] = q, weights[q], h[q, q]
            count += 1
        elif every:
            lost[q // every] += 1
    return count


@njit(cache=True, nogil=True)
def cheapest_weight(w: Array, d: Array, step: int, count: int, order: Array, lost: Array, most: int, every: int) -> int:
    """Return the index of the weight with the least loss, -1 if none may be removed."""
    best, index = inf, -1
    for j in range(step, count):
        if w[j] * w[j] < best * d[j] and (every == 0 or lost[order[j] // every] < most):
            best, index = w[j] * w[j] / d[j], j
    return index


@njit(cache=True, nogil=True)
def _swap(factor: Array, state: Array, order: Array, step: int, index: int) -> None:
    """Move the removed weight in front of the remaining ones."""
    order[step], order[index] = order[index], order[step]
    for line in range(2):
        state[line, step], state[line, index] = state[line, index], state[line, step]
    for line in range(step):
        factor[line, step], factor[line, index] = factor[line, index], factor[line, step]


@njit(cache=True, nogil=True, fastmath={"contract"})
def subtract_lines(lines: Array, row: Array, position: int, number: int, first: int, count: int) -> None:
    """Subtract the first lines of a factor, times their value at a weight, from the columns first..count of its row."""
    line = 0
    while line + 4 <= number:  # four at a time, with the sums in registers
        a0, a1 = lines[line, position], lines[line + 1, position]
        a2, a3 = lines[line + 2, position], lines[line + 3, position]
        f0, f1 = lines[line, first:count], lines[line + 1, first:count]
        f2, f3 = lines[line + 2, first:count], lines[line + 3, first:count]
        for j in range(len(row)):
            row[j] -= a0 * f0[j] + a1 * f1[j] + a2 * f2[j] + a3 * f3[j]
        line += 4
    while line < number:
        a0, f0 = lines[line, position], lines[line, first:count]
        for j in range(len(row)):
            row[j] -= a0 * f0[j]
        line += 1


@njit(cache=True, nogil=True, fastmath={"contract"})
def _remove(h: Array, factor: Array, state: Array, order: Array, step: int, count: int) -> None:
    """Compute the next row of the factor, and update the remaining weights and variances."""
    left = count - step - 1
    w, d, row, indices = state[0, step + 1 :], state[1, step + 1 :], state[2, step + 1 :], order[step + 1 :]
    for j in range(left):
        row[j] = h[indices[j]]
    subtract_lines(factor, row[:left], step, step, step + 1, count)
    pivot = 1 / sqrt(state[1, step])
    share, new_row = state[0, step] * pivot, factor[step, step + 1 :]
    for j in range(left):
        new_row[j] = row[j] * pivot
        d[j] = max(d[j] - new_row[j] * new_row[j], MIN_VARIANCE)
        w[j] -= share * new_row[j]
