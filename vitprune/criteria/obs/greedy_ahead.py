"""The elimination of greedy.py for long rows on one CPU thread: rows of the factor are computed ahead.

The order is that of greedy_numba.py. Its time goes into one pass over the whole factor for every removed weight, which
memory bandwidth limits. Here a pass serves all weights that are cheapest at that moment; each of them is brought up to
date by the few later steps when its turn comes. The factor is stored by columns, so that a pass consists of scalar
products of contiguous numbers, and the exchange of two weights is a copy of one column.

Import this module only if numba is installed.
"""

from math import inf, sqrt
from typing import Any

import numpy as np
from numba import njit

from vitprune.criteria.obs.greedy import MIN_VARIANCE
from vitprune.criteria.obs.greedy_numba import cheapest_weight, collect_nonzero, subtract_lines

Array = np.ndarray[Any, Any]

TILE, COLUMNS = 1024, 8  # lines and columns of the factor that remain in the caches


@njit(cache=True, nogil=True)
def eliminate_rows(
    inverse: Array,
    weights: Array,
    losses: Array,
    blocks: Array,
    columns: Array,
    recent: Array,
    ahead: Array,
    keep: int,
    every: int,
) -> None:
    """Fill losses (all, B) of the given blocks; `inverse` is (all, B, B), or (1, B, B) if they share one.

    Workspace, whose type is that of the products: `columns` (B, B) of the factor, its `recent` lines (candidates, B),
    rows computed `ahead` (candidates + 1, B).
    """
    size, most = weights.shape[1], every - keep
    state = np.empty((3, size))  # weights, conditional variances, losses of removal
    order, lost, slot = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    for block in blocks:
        h = inverse[block if len(inverse) > 1 else 0]
        count = collect_nonzero(h, weights[block], losses[block], state, order, lost, every)
        level, done = 0.0, 0  # `done`: steps that are in `columns` and in the rows ahead
        slot[:] = -1
        for step in range(count):
            index = cheapest_weight(state[0], state[1], step, count, order, lost, most, every)
            if index < 0:
                break
            if slot[index] < 0:
                _select_costs(state, step, count, order, lost, most, every)
                _refresh(h, columns, recent, ahead, state[2], order, slot, done, step, count, index)
                done = step
            level = max(level + state[0, index] ** 2 / state[1, index] / 2, np.nextafter(level, inf))
            _move_to_front(columns, recent, ahead, state, order, slot, done, step, index)
            losses[block, order[step]] = level
            if every:
                lost[order[step] // every] += 1
            _append(recent, ahead[slot[step]], state, step - done, step, count)


@njit(cache=True, nogil=True)
def _select_costs(state: Array, step: int, count: int, order: Array, lost: Array, most: int, every: int) -> None:
    """Write the loss of removal of every remaining weight, infinity if it may not be removed."""
    w, d, costs = state[0], state[1], state[2]
    for j in range(step, count):
        costs[j] = w[j] * w[j] / d[j] if every == 0 or lost[order[j] // every] < most else inf


@njit(cache=True, nogil=True)
def _refresh(
    h: Array,
    columns: Array,
    recent: Array,
    ahead: Array,
    costs: Array,
    order: Array,
    slot: Array,
    done: int,
    step: int,
    count: int,
    index: int,
) -> None:
    """Compute the rows of the cheapest weights, including `index`, after all steps so far."""
    size = len(recent)
    rank = min(size, count - step) - 1
    limit = np.partition(costs[step:count], rank)[rank]
    free, number = np.ones(size, np.bool_), 0
    for j in range(step, count):
        for line in range(step - done):
            columns[j, done + line] = recent[line, j]
        if slot[j] >= 0 and costs[j] < limit:
            free[slot[j]] = False
            subtract_lines(recent, ahead[slot[j], step:count], j, step - done, step, count)
        else:
            slot[j] = -1
    empty = np.flatnonzero(free)
    slots, positions = np.full(size + 3, size), np.full(size + 3, step)  # filled up with the last row, which is unused
    for j in range(step - 1, count):
        at = index if j < step else j  # the cheapest one first: ties cannot crowd it out
        if slot[at] < 0 and (j < step or (costs[at] <= limit and costs[at] < inf)) and number < len(empty):
            slot[at], slots[number], positions[number] = empty[number], empty[number], at
            row, line_of_h = ahead[slot[at]], h[order[at]]
            for q in range(step, count):
                row[q] = line_of_h[order[q]]
            number += 1
    number += -number % 4
    _subtract_products(columns, ahead, slots[:number], positions[:number], step, count)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _subtract_products(columns: Array, ahead: Array, slots: Array, positions: Array, step: int, count: int) -> None:
    """Subtract the products of the factor's columns from the rows of the weights at some positions, four at a time."""
    zero = ahead.dtype.type(0)
    for begin in range(0, step, TILE):
        end = min(begin + TILE, step)
        for first in range(step, count, COLUMNS):
            for four in range(0, len(slots), 4):
                p, q = positions[four : four + 4], slots[four : four + 4]
                a0, a1 = columns[p[0], begin:end], columns[p[1], begin:end]
                a2, a3 = columns[p[2], begin:end], columns[p[3], begin:end]
                for j in range(first, min(first + COLUMNS, count), 2):
                    i = min(j + 1, count - 1)
                    x, y = columns[j, begin:end], columns[i, begin:end]
                    s0, s1, s2, s3 = zero, zero, zero, zero
                    t0, t1, t2, t3 = zero, zero, zero, zero
                    for line in range(end - begin):
                        s0 += a0[line] * x[line]
                        s1 += a1[line] * x[line]
                        s2 += a2[line] * x[line]
                        s3 += a3[line] * x[line]
                        t0 += a0[line] * y[line]
                        t1 += a1[line] * y[line]
                        t2 += a2[line] * y[line]
                        t3 += a3[line] * y[line]
                    ahead[q[0], j] -= s0
                    ahead[q[1], j] -= s1
                    ahead[q[2], j] -= s2
                    ahead[q[3], j] -= s3
                    if i > j:
                        ahead[q[0], i] -= t0
                        ahead[q[1], i] -= t1
                        ahead[q[2], i] -= t2
                        ahead[q[3], i] -= t3


@njit(cache=True, nogil=True)
def _move_to_front(
    columns: Array,
    recent: Array,
    ahead: Array,
    state: Array,
    order: Array,
    slot: Array,
    done: int,
    step: int,
    index: int,
) -> None:
    """Exchange the removed weight with the first remaining one; of the removed one, recent lines are still needed."""
    order[step], order[index] = order[index], order[step]
    slot[step], slot[index] = slot[index], slot[step]
    for line in range(2):
        state[line, step], state[line, index] = state[line, index], state[line, step]
    columns[index, :done] = columns[step, :done]
    for line in range(step - done):
        recent[line, step], recent[line, index] = recent[line, index], recent[line, step]
    for line in range(len(ahead)):
        ahead[line, index] = ahead[line, step]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _append(recent: Array, row: Array, state: Array, lines: int, step: int, count: int) -> None:
    """Finish the next row of the factor, and update the remaining weights and variances."""
    rest = row[step + 1 : count]
    subtract_lines(recent, rest, step, lines, step + 1, count)
    w, d, new = state[0, step + 1 : count], state[1, step + 1 : count], recent[lines, step + 1 : count]
    pivot = 1 / sqrt(state[1, step])
    share = state[0, step] * pivot
    for j in range(len(rest)):
        value = rest[j] * pivot
        new[j] = value
        d[j] = max(d[j] - value * value, MIN_VARIANCE)
        w[j] -= share * value
