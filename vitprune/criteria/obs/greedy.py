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
RISE = 1e-12  # of what would be equal, so that the order stays
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
    losses = torch.full(weights.shape, torch.inf, dtype=torch.float64, device=inverse.device)
    blocks, size = torch.arange(len(weights), device=inverse.device), weights.shape[1]
    if pattern is not None or share >= 1:
        _follow(inverse, weights, losses, blocks, size, torch.inf, pattern)
        return losses
    cap, wanted = min(size, int(size * (share + MARGIN)) + 1), int(share * weights.numel() + 0.5)
    _follow(inverse, weights, losses, blocks, cap, 0.0, None)
    if wanted:
        threshold = float(losses.flatten().kthvalue(wanted).values)
        reached = losses.masked_fill(losses.isinf(), -torch.inf).amax(dim=1)
        short = blocks[(reached < threshold) & losses.isinf().any(dim=1)]
        _follow(inverse, weights, losses, short, cap, threshold, None)  # from the start: nothing of it is kept
    return losses


def increments(losses: Tensor) -> Tensor:
    """What each weight added to its block's loss, made to rise in the order of removal; (blocks, B)."""
    ranked, order = losses.sort(dim=1, stable=True)
    added = ranked.diff(dim=1, prepend=torch.zeros_like(ranked[:, :1])).cummax(dim=1).values
    added *= 1 + RISE * torch.arange(added.shape[1], dtype=added.dtype, device=added.device)
    return torch.empty_like(added).scatter_(1, order, added)


def compiled() -> bool:
    """Whether numba is there to compile the elimination for the CPU."""
    return find_spec("numba") is not None


def _follow(
    inverse: Tensor, weights: Tensor, losses: Tensor, blocks: Tensor, cap: int, limit: float, pattern: Pattern | None
) -> None:
    """Fill in the losses of some blocks up to `cap` weights, and on while they are below `limit`; infinite beyond."""
    if inverse.device.type == "cpu" and compiled():
        _on_cpu(inverse, weights, losses, blocks, cap, limit, pattern)
    elif len(blocks):
        losses[blocks] = batched(inverse[blocks], weights[blocks], cap, limit, pattern)


def _on_cpu(
    inverse: Tensor, weights: Tensor, losses: Tensor, blocks: Tensor, cap: int, limit: float, pattern: Pattern | None
) -> None:
    from vitprune.criteria.obs.greedy_numba import eliminate_all  # importing numba takes a second

    matrices = inverse.double().contiguous().numpy()
    vectors = weights.detach().double().contiguous().numpy()
    chosen, found = blocks.numpy(), losses.numpy()
    keep, every = pattern or (0, 0)
    threads = torch.get_num_threads()
    edges = np.linspace(0, len(chosen), 4 * threads + 1 if threads > 1 else 2).astype(int).tolist()

    def piece(edge: Sequence[int]) -> None:
        eliminate_all(matrices, vectors, found, chosen[edge[0] : edge[1]], cap, limit, keep, every)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, pairwise(edges)))


def batched(inverse: Tensor, weights: Tensor, cap: int, limit: float, pattern: Pattern | None = None) -> Tensor:
    """The same in torch, all blocks in step, on any device; for GPUs and where numba is missing."""
    w = weights.detach().double().clone()
    variance = inverse.diagonal(dim1=1, dim2=2).double().clone()
    gone = w == 0
    found = torch.full_like(w, torch.inf).masked_fill(gone, 0.0)
    level, number = torch.zeros_like(w[:, 0]), gone.sum(dim=1)
    factor = torch.zeros_like(inverse, dtype=w.dtype)  # (blocks, steps, B)
    rows = torch.arange(len(w), device=w.device)
    for step in range(w.shape[1]):
        costs = (w.square() / variance).masked_fill(gone | _full(gone, pattern), torch.inf)
        cost, place = costs.min(dim=1)
        going = cost.isfinite() & ((number < cap) | (level < limit))
        if not bool(going.any()):
            break
        level = torch.where(going, torch.maximum(level + cost / 2, torch.nextafter(level, level + 1)), level)
        before = torch.einsum("bs,bsq->bq", factor[rows, :step, place], factor[:, :step])
        pivot = variance[rows, place].sqrt()
        row = torch.where(going[:, None], (inverse[rows, place].double() - before) / pivot[:, None], 0.0)
        w -= (w[rows, place] / pivot)[:, None] * row
        variance = (variance - row.square()).clamp_min(LEAST)
        factor[:, step] = row
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
