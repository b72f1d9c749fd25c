"""Supports of N:M sparse rows by the alternating direction method of multipliers (ADMM)."""

import torch
from torch import Tensor

Pattern = tuple[int, int]  # keep N of every M consecutive weights

FIRST_PENALTY, LAST_PENALTY = 0.1, 1e6  # relative to a normalized matrix, whose diagonal is 1
LOOK_EVERY = 3  # iterations between two changes of the penalty
STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # fraction of the support that changed: factor of the penalty
EARLY = 30  # iterations before a support that hardly changes ends the search
FEW_CHANGES, MOST_ITERATIONS = 3e-4, 300


def nm_support(moments: Tensor, rows: Tensor, pattern: Pattern) -> Tensor:
    """Choose N of every M consecutive weights so that the least-squares loss of each row on its support is small.

    Minimizes tr((D - W) C (D - W)^T) over matrices D with the pattern. The loss of a row after an exact solve on the
    support is lower than that of greedy elimination (docs/LOG.md). Costs one eigendecomposition of C, and two products
    of (k, k) and (k, o) per iteration.

    Args:
        moments: Second moment C of the layer's inputs, positive definite, (k, k).
        rows: Weights W, (o, k); k is a multiple of M.
        pattern: (N, M).

    Returns:
        The support, (o, k) booleans; exactly N of every M consecutive ones are True.

    Source: ALPS (Meng et al., NeurIPS 2024), section 3 and its schedule of the penalty.
    """
    scale = moments.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(moments / torch.outer(scale, scale))
    vectors, start = vectors.to(torch.float32), (rows * scale).T.to(torch.float32)  # (k, o)
    values = values.clamp_min(0).to(torch.float32)
    target = vectors * values @ (vectors.T @ start)
    penalty, moved = FIRST_PENALTY, False
    sparse, dual = keep_largest(start, pattern), torch.zeros_like(start)
    seen = sparse != 0
    for iteration in range(1, MOST_ITERATIONS + 1):
        dense = vectors @ ((vectors.T @ (target - dual + penalty * sparse)) / (values + penalty)[:, None])
        sparse = keep_largest(dense + dual / penalty, pattern)
        dual += penalty * (dense - sparse)
        if iteration % LOOK_EVERY:
            continue
        support = sparse != 0
        changed = float((support != seen).sum()) / max(1, int(seen.sum()))
        seen = support
        if changed == 0 or penalty > LAST_PENALTY or (iteration >= EARLY and changed < FEW_CHANGES):
            if moved or penalty < 1e-4:
                break
            penalty /= 5  # the support has not moved from the largest weights: the penalty is too large
            continue
        factor = next(factor for least, factor in STEPS if changed > least)
        penalty, moved = penalty * factor, moved or changed > STEPS[1][0]
    return largest(dense + dual / penalty, pattern).T.contiguous()


def keep_largest(values: Tensor, pattern: Pattern) -> Tensor:
    """Set all but the N largest of every M consecutive values of a column to zero; (k, o)."""
    return values * largest(values, pattern)


def largest(values: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of the N largest magnitudes of every M consecutive values of a column; (k, o) booleans."""
    keep, every = pattern
    runs = values.abs().view(-1, every, values.shape[1])
    indices = runs.topk(keep, dim=1).indices
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(1, indices, True).view(values.shape)
