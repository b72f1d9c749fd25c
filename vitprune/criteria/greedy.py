"""Greedy elimination of the weights of many blocks at once: what each costs, and in which order they go."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Pattern = tuple[int, int]  # N of every M consecutive weights stay

MARGIN = 0.2  # of a block, beyond the share that goes of all, before blocks are compared
LEAST = 1e-300  # of a conditional variance that rounding has eaten up


def eliminate(inverse: Tensor, weights: Tensor, share: float = 1.0, pattern: Pattern | None = None) -> Tensor:
    """Remove the weights of every block one by one, each time the one that costs least after the others make up for it.

    inverse (blocks, B, B) of the damped Fisher blocks, weights (blocks, B). Returns (blocks, B) float64: the loss of a
    block up to and including that weight, in nats per image, strictly rising in the order of removal. Weights that are
    zero are gone before, at no loss. With `share` below 1, blocks are followed only as far as it takes to tell which
    share of all weights costs least; what is beyond is infinite. With a `pattern`, no run of M loses more than M - N.

    Source: CAP (Kuznedelev et al. 2023), algorithm 1; as a left-looking Cholesky factorisation of the inverse with
    pivots argmin w_p^2 / h_pp, of which only the diagonal is kept up to date.
    """
    if pattern is not None or share >= 1:
        return _followed(inverse, weights, weights.shape[1], torch.inf, pattern)
    cap = min(weights.shape[1], int(weights.shape[1] * (share + MARGIN)) + 1)
    found = _followed(inverse, weights, cap, 0.0, None)
    wanted = int(share * weights.numel() + 0.5)
    if not wanted:
        return found
    threshold = float(found.flatten().kthvalue(wanted).values)
    reached = torch.where(found.isfinite(), found, -torch.inf).amax(dim=1)
    short = ((reached < threshold) & found.isinf().any(dim=1)).nonzero().flatten()
    if len(short):
        found[short] = _followed(inverse[short], weights[short], cap, threshold, None)
    return found


def increments(losses: Tensor) -> Tensor:
    """What each weight added to its block's loss, made to rise in the order of removal; (blocks, B)."""
    ranked, order = losses.sort(dim=1, stable=True)
    added = ranked.diff(dim=1, prepend=torch.zeros_like(ranked[:, :1])).cummax(dim=1).values
    return torch.empty_like(added).scatter_(1, order, added)


def compiled() -> bool:
    """Whether numba is there to compile the elimination for the CPU."""
    return find_spec("numba") is not None


def _followed(inverse: Tensor, weights: Tensor, cap: int, limit: float, pattern: Pattern | None) -> Tensor:
    """Losses of every block up to `cap` weights, and on while they are below `limit`; infinite beyond."""
    if inverse.device.type == "cpu" and compiled():
        return _on_cpu(inverse, weights, cap, limit, pattern)
    return batched(inverse, weights, cap, limit, pattern)


def _on_cpu(inverse: Tensor, weights: Tensor, cap: int, limit: float, pattern: Pattern | None) -> Tensor:
    from vitprune.criteria.greedy_kernel import eliminate_all  # importing numba takes a second

    found = np.empty(tuple(weights.shape))
    matrices = inverse.double().contiguous().numpy()
    vectors = weights.detach().double().contiguous().numpy()
    keep, every = pattern or (0, 0)
    threads = min(torch.get_num_threads(), len(found))
    edges = np.linspace(0, len(found), 4 * threads + 1 if threads > 1 else 2).astype(int).tolist()

    def piece(edge: Sequence[int]) -> None:
        at = slice(edge[0], edge[1])
        eliminate_all(matrices[at], vectors[at], found[at], cap, limit, keep, every)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, pairwise(edges)))
    return torch.from_numpy(found)


def batched(inverse: Tensor, weights: Tensor, cap: int, limit: float, pattern: Pattern | None = None) -> Tensor:
    """The same in torch, all blocks in step, on any device; for GPUs and where numba is missing."""
    w = weights.detach().double().clone()
    diagonal = inverse.diagonal(dim1=1, dim2=2).double().clone()
    gone = w == 0
    found = torch.full_like(w, torch.inf).masked_fill(gone, 0.0)
    level = torch.zeros_like(w[:, 0])
    number = gone.sum(dim=1)
    factor = torch.zeros(len(w), 0, w.shape[1], dtype=w.dtype, device=w.device)
    rows = torch.arange(len(w), device=w.device)
    for _ in range(w.shape[1]):
        costs = (w.square() / diagonal).masked_fill(gone | _full(gone, pattern), torch.inf)
        cost, place = costs.min(dim=1)
        going = cost.isfinite() & ((number < cap) | (level < limit))
        if not bool(going.any()):
            break
        level = torch.where(going, torch.maximum(level + cost / 2, torch.nextafter(level, level + 1)), level)
        pivot = diagonal[rows, place].sqrt()
        row = inverse[rows, place].double()
        if factor.shape[1]:
            row = row - torch.einsum("bs,bsq->bq", factor[rows, :, place], factor)
        row = torch.where(going[:, None], row / pivot[:, None], 0.0)
        w -= (w[rows, place] / pivot)[:, None] * row
        diagonal = (diagonal - row.square()).clamp_min(LEAST)
        factor = torch.cat([factor, row[:, None]], dim=1)
        found[rows[going], place[going]] = level[going]
        gone[rows[going], place[going]] = True
        number += going
    return found


def _full(gone: Tensor, pattern: Pattern | None) -> Tensor:
    """Weights of runs that have lost as many as they may; (blocks, B)."""
    if pattern is None:
        return torch.zeros_like(gone)
    keep, every = pattern
    lost = gone.view(len(gone), -1, every).sum(dim=2)
    return (lost >= every - keep).repeat_interleave(every, dim=1)
