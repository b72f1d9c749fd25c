"""The elimination of greedy.py for long rows on one CPU thread: rows of the factor are computed ahead.

The order is that of greedy_numba.py. Its time goes into one pass over the whole factor for every removed weight, which
memory bandwidth limits. Here a pass serves all weights that are cheapest at that moment; each of them is brought up to
date by the few later steps when its turn comes. Import this module only if numba is installed.
"""

from math import inf, sqrt
from typing import Any

import numpy as np
from numba import njit

from vitprune.criteria.obs.greedy_numba import MIN_VARIANCE, cheapest_weight, collect_nonzero

Array = np.ndarray[Any, Any]

TILE = 512  # columns whose part of four lines of the factor remains in the first cache


@njit(cache=True, nogil=True)
def eliminate_rows(
    inverse: Array, weights: Array, losses: Array, blocks: Array, factor: Array, ahead: Array, keep: int, every: int
) -> None:
    """Fill losses (all, B) of the given blocks; `inverse` is (all, B, B), or (1, B, B) if they share one.

    `factor` (B, B) and `ahead` (candidates + 1, B) are workspace, of zeros; their type is that of the products.
    """
    size, most = weights.shape[1], every - keep
    state = np.empty((3, size))  # weights, conditional variances, losses of removal
    order, lost, slot = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    for block in blocks:
        h = inverse[block if len(inverse) > 1 else 0]
        count = collect_nonzero(h, weights[block], losses[block], state, order, lost, every)
        level, done = 0.0, 0  # `done`: steps that the rows ahead contain
        slot[:] = -1
        for step in range(count):
            index = cheapest_weight(state[0], state[1], step, count, order, lost, most, every)
            if index < 0:
                break
            if slot[index] < 0:
                _select_costs(state, step, count, order, lost, most, every)
                _refresh(h, factor, ahead, state[2], order, slot, done, step, count, index)
                done = step - step % 4
            level = max(level + state[0, index] ** 2 / state[1, index] / 2, np.nextafter(level, inf))
            _move_to_front(factor, ahead, state, order, slot, done, step, index)
            losses[block, order[step]] = level
            if every:
                lost[order[step] // every] += 1
            _append(factor, ahead[slot[step]], state, done, step, count)


@njit(cache=True, nogil=True)
def _select_costs(state: Array, step: int, count: int, order: Array, lost: Array, most: int, every: int) -> None:
    """Write the loss of removal of every remaining weight, infinity if it may not be removed."""
    w, d, costs = state[0], state[1], state[2]
    for j in range(step, count):
        costs[j] = w[j] * w[j] / d[j] if every == 0 or lost[order[j] // every] < most else inf


@njit(cache=True, nogil=True)
def _refresh(
    h: Array,
    factor: Array,
    ahead: Array,
    costs: Array,
    order: Array,
    slot: Array,
    done: int,
    step: int,
    count: int,
    index: int,
) -> None:
    """Hold the rows of the cheapest weights, `index` among them, and bring them up to date with all steps."""
    size = len(ahead) - 1
    limit = np.partition(costs[step:count], min(size, count - step) - 1)[min(size, count - step) - 1]
    free = np.ones(size, np.bool_)
    slots, positions = np.full((2, size + 1), size), np.full((2, size + 1), step)  # of new rows, and of old ones
    num_old, num_new = 0, 0
    for j in range(step, count):
        if slot[j] >= 0 and costs[j] < limit:
            free[slot[j]], slots[1, num_old], positions[1, num_old] = False, slot[j], j
            num_old += 1
        else:
            slot[j] = -1
    empty = np.flatnonzero(free)
    for j in range(step - 1, count):
        at = index if j < step else j  # the cheapest one first: ties cannot crowd it out
        if slot[at] < 0 and (j < step or (costs[at] <= limit and costs[at] < inf)) and num_new < len(empty):
            slot[at], slots[0, num_new], positions[0, num_new] = empty[num_new], empty[num_new], at
            row, line = ahead[slot[at]], h[order[at]]
            for q in range(step, count):
                row[q] = line[order[q]]
            num_new += 1
    num_new, num_old = num_new + num_new % 2, num_old + num_old % 2  # the last slot makes them even
    _subtract(factor, ahead, slots[0, :num_new], positions[0, :num_new], 0, step - step % 4, step, count)
    _subtract(factor, ahead, slots[1, :num_old], positions[1, :num_old], done, step - step % 4, step, count)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _subtract(
    factor: Array, ahead: Array, slots: Array, positions: Array, begin: int, end: int, step: int, count: int
) -> None:
    """Subtract the lines begin..end of the factor from an even number of rows, tile by tile, sums in registers."""
    for first in range(step, count, TILE):
        last = min(first + TILE, count)
        for line in range(begin, end, 4):
            f0, f1 = factor[line, first:last], factor[line + 1, first:last]
            f2, f3 = factor[line + 2, first:last], factor[line + 3, first:last]
            for pair in range(0, len(slots), 2):
                p, q = positions[pair], positions[pair + 1]
                a0, a1, a2, a3 = factor[line, p], factor[line + 1, p], factor[line + 2, p], factor[line + 3, p]
                b0, b1, b2, b3 = factor[line, q], factor[line + 1, q], factor[line + 2, q], factor[line + 3, q]
                x, y = ahead[slots[pair], first:last], ahead[slots[pair + 1], first:last]
                for j in range(last - first):
                    x[j] -= a0 * f0[j] + a1 * f1[j] + a2 * f2[j] + a3 * f3[j]
                    y[j] -= b0 * f0[j] + b1 * f1[j] + b2 * f2[j] + b3 * f3[j]


@njit(cache=True, nogil=True)
def _move_to_front(
    factor: Array, ahead: Array, state: Array, order: Array, slot: Array, done: int, step: int, index: int
) -> None:
    """Exchange the removed weight with the first remaining one; of the removed one, lines from `done` are needed."""
    order[step], order[index] = order[index], order[step]
    slot[step], slot[index] = slot[index], slot[step]
    for line in range(2):
        state[line, step], state[line, index] = state[line, index], state[line, step]
    for line in range(done):
        factor[line, index] = factor[line, step]
    for line in range(done, step):
        factor[line, step], factor[line, index] = factor[line, index], factor[line, step]
    for line in range(len(ahead)):
        ahead[line, index] = ahead[line, step]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _append(factor: Array, row: Array, state: Array, done: int, step: int, count: int) -> None:
    """Finish the next row of the factor, and update the remaining weights and variances."""
    rest = row[step + 1 : count]
    line = done
    while line + 4 <= step:
        a0, a1 = factor[line, step], factor[line + 1, step]
        a2, a3 = factor[line + 2, step], factor[line + 3, step]
        f0, f1 = factor[line, step + 1 : count], factor[line + 1, step + 1 : count]
        f2, f3 = factor[line + 2, step + 1 : count], factor[line + 3, step + 1 : count]
        for j in range(len(rest)):
            rest[j] -= a0 * f0[j] + a1 * f1[j] + a2 * f2[j] + a3 * f3[j]
        line += 4
    while line < step:
        a0, f0 = factor[line, step], factor[line, step + 1 : count]
        for j in range(len(rest)):
            rest[j] -= a0 * f0[j]
        line += 1
    w, d, new = state[0, step + 1 : count], state[1, step + 1 : count], factor[step, step + 1 : count]
    pivot = 1 / sqrt(state[1, step])
    share = state[0, step] * pivot
    for j in range(len(rest)):
        value = rest[j] * pivot
        new[j] = value
        d[j] = max(d[j] - value * value, MIN_VARIANCE)
        w[j] -= share * value
