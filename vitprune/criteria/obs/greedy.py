"""Greedy OBS elimination of single weights, batched over blocks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Pattern = tuple[int, int]  # keep N of every M consecutive weights

TIE_BREAK = 1e-12  # relative step between equal increments, which keeps the order of removal
CANDIDATES = 64  # weights whose rows of the factor are computed ahead
MIN_VARIANCE = 1e-300  # lower bound of a conditional variance after rounding


def eliminate_weights(
    inverse: Tensor, weights: Tensor, pattern: Pattern | None = None, ahead: torch.dtype | None = None
) -> Tensor:
    """Remove the weights of every block one by one by OBS, each time the one of least loss w_p^2 / (2 h_pp).

    Args:
        inverse: Inverses of the damped Fisher blocks, (blocks, B, B).
        weights: (blocks, B). Zero weights are removed first, at loss 0.
        pattern: (N, M) removes at most M - N of every M consecutive weights; the others score infinity.
        ahead: Compute rows of the factor ahead in this type: the same up to rounding, faster.

    Returns:
        Cumulative loss of the block at the removal of each weight, in nats per image, strictly increasing in the
        order of removal; (blocks, B), float64.

    Source: CAP (Kuznedelev et al. 2023), algorithm 1; computed as a left-looking Cholesky factorization of the inverse
        with pivots argmin w_p^2 / h_pp, which updates only the diagonal.
    """
    if inverse.device.type == "cpu" and has_numba():
        return _eliminate_compiled(inverse, weights, pattern, ahead)
    return eliminate_weights_torch(inverse, weights, pattern)


def loss_increments(losses: Tensor) -> Tensor:
    """Return each weight's increment of its block's loss, made monotone in the order of removal; (blocks, B)."""
    ranked, order = losses.sort(dim=1, stable=True)
    added = ranked.diff(dim=1, prepend=torch.zeros_like(ranked[:, :1])).cummax(dim=1).values
    added *= 1 + TIE_BREAK * torch.arange(added.shape[1], dtype=added.dtype, device=added.device)
    return torch.empty_like(added).scatter_(1, order, added)


def has_numba() -> bool:
    """Return whether numba is installed, which compiles the elimination on the CPU."""
    return find_spec("numba") is not None


def _eliminate_compiled(inverse: Tensor, weights: Tensor, pattern: Pattern | None, ahead: torch.dtype | None) -> Tensor:
    from vitprune.criteria.obs.greedy_ahead import eliminate_rows  # importing numba takes a second
    from vitprune.criteria.obs.greedy_numba import eliminate_blocks

    shared = inverse[:1] if inverse.stride(0) == 0 else inverse  # an expanded inverse is not copied for every row
    matrices = shared.double().contiguous().numpy()
    vectors = weights.detach().double().contiguous().numpy()
    losses, size = torch.full(weights.shape, torch.inf, dtype=torch.float64), weights.shape[1]
    keep, every = pattern or (0, 0)

    def eliminate_slice(edge: Sequence[int]) -> None:
        blocks, result = np.arange(*edge), losses.numpy()
        if ahead is None:
            eliminate_blocks(matrices, vectors, result, blocks, keep, every)
        else:
            work = [torch.zeros(number, size, dtype=ahead).numpy() for number in (size, CANDIDATES, CANDIDATES + 1)]
            eliminate_rows(matrices, vectors, result, blocks, *work, keep, every)

    _in_threads(eliminate_slice, len(weights))
    return losses


def _in_threads(work: Callable[[Sequence[int]], None], number: int) -> None:
    """Call `work` with the bounds of slices of `number` blocks, in as many threads as torch has."""
    threads = torch.get_num_threads()
    edges = np.linspace(0, number, 4 * threads + 1 if threads > 1 else 2).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, pairwise(edges)))


def eliminate_weights_torch(inverse: Tensor, weights: Tensor, pattern: Pattern | None) -> Tensor:
    """Eliminate in all blocks at once with torch, on any device; for GPUs and without numba."""
    w = weights.detach().double().clone()
    variance = inverse.diagonal(dim1=1, dim2=2).double().clone()
    removed = w == 0
    result = torch.full_like(w, torch.inf).masked_fill(removed, 0.0)
    level = torch.zeros_like(w[:, 0])
    factor = torch.zeros_like(inverse, dtype=w.dtype)  # (blocks, steps, B)
    rows = torch.arange(len(w), device=w.device)
    for step in range(w.shape[1]):
        costs = (w.square() / variance).masked_fill(removed | _at_limit(removed, pattern), torch.inf)
        cost, index = costs.min(dim=1)
        active = cost.isfinite()
        if not bool(active.any()):
            break
        level = torch.where(active, torch.maximum(level + cost / 2, torch.nextafter(level, level + 1)), level)
        before = torch.einsum("bs,bsq->bq", factor[rows, :step, index], factor[:, :step])
        pivot = variance[rows, index].sqrt()
        row = torch.where(active[:, None], (inverse[rows, index].double() - before) / pivot[:, None], 0.0)
        w -= (w[rows, index] / pivot)[:, None] * row
        variance = (variance - row.square()).clamp_min(MIN_VARIANCE)
        factor[:, step] = row
        result[rows[active], index[active]] = level[active]
        removed[rows[active], index[active]] = True
    return result


def _at_limit(removed: Tensor, pattern: Pattern | None) -> Tensor:
    """Mask the weights of runs that have lost M - N weights; (blocks, B)."""
    if pattern is None:
        return torch.zeros_like(removed)
    keep, every = pattern
    lost = removed.view(len(removed), -1, every).sum(dim=2)
    return (lost >= every - keep).repeat_interleave(every, dim=1)
