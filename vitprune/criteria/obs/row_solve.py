"""Least squares of all rows of a layer on the inputs that their masks keep: conjugate gradients or Cholesky factors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vitprune.criteria.obs.unit_elimination import RIDGES, add_ridge, fit_and_test_moments
from vitprune.errors import BadInput

RIDGE_ROWS = 24  # rows on which the ridge is selected
EXCESS = 1e-8  # of the squared error above its minimum, relative; bounds the error on other images by its root
FLOOR = 1e-6  # least squared error, relative to the dense output, to which `EXCESS` refers
ITERATIONS, ROUNDS = 100, 4  # of conjugate gradients in float32, and of residuals in float64
ROWS_AT_ONCE = 512
SOLVE_BYTES = 1 << 28  # for the matrices of the rows that are factorized at once
BYTES_PER_ENTRY = 3 * 8  # matrix, factor and workspace


def solve_rows(rows: Tensor, halves: Tensor, keep: Tensor, constant: bool, name: str) -> Tensor:
    """Fit every row's dense output by ridge regression on the inputs that its mask keeps.

    The ridge is the one of `RIDGES` with the least error on the fold of images that was not fitted, or the next larger
    one for which the matrices of all rows are positive definite.

    Args:
        rows: Dense weights, (o, k), float64.
        halves: Second moments of the inputs with a 1 appended, (folds, k+1, k+1).
        keep: (o, k) booleans.
        constant: Whether the layer has a bias to refit.
        name: Name of the weights, for the error message.

    Returns:
        (o, k+1): new weights, zero where removed; the last column is added to the bias.

    Raises:
        BadInput: the rows cannot be solved with any ridge.
    """
    keep_inputs = torch.cat([keep, torch.full_like(keep[:, :1], constant)], dim=1)
    dense = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)
    sample = torch.arange(0, len(rows), max(1, len(rows) // RIDGE_ROWS), device=rows.device)
    folds = [_held_out(dense[sample], *fold, keep_inputs[sample]) for fold in fit_and_test_moments(halves)]
    best = int(torch.tensor(folds).sum(dim=0).nan_to_num(torch.inf).argmin())
    for ridge in RIDGES[best:]:
        solved = solve_restricted(dense, add_ridge(halves.sum(dim=0), ridge), keep_inputs)
        if bool(solved.isfinite().all()):
            return solved
    raise BadInput(
        f"{name}: obc cannot solve its rows, the second moment of its inputs is not positive definite; "
        "check the weights and images, or exclude this layer"
    )


def solve_restricted(dense: Tensor, damped: Tensor, keep: Tensor, start: Tensor | None = None) -> Tensor:
    """Minimize (x - w)^T C (x - w) over the kept entries of every row; NaN in rows that have no solution.

    Conjugate gradients run on all rows at once, with C scaled to a unit diagonal and preconditioned by P C^-1 P, where
    P sets removed entries to zero. The residual r and M = P C^-1 P bound the squared error above its minimum by
    r^T M r, since (C^-1)_SS >= (C_SS)^-1; a row is finished when this is at most `EXCESS` times its squared error.
    Products are in float32, residuals and the bound in float64 (iterative refinement). Rows that are not finished
    after `ROUNDS` rounds, few kept inputs, and a C that is not positive definite, are solved by Cholesky factors.

    Args:
        dense: W, (rows, k).
        damped: C, (k, k).
        keep: (rows, k) booleans.
        start: First approximation of x, (rows, k); default: w.
    """
    scale = damped.diagonal().clamp_min(torch.finfo(damped.dtype).tiny).sqrt()
    matrix = damped / scale / scale[:, None]
    if _factors_are_cheaper(keep):
        return _factorized(dense * scale, matrix, keep) / scale
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(factor.isfinite().all()):
        return _factorized(dense * scale, matrix, keep) / scale
    inverse = torch.cholesky_inverse(factor)
    result = (dense if start is None else start) * scale * keep
    for part in (slice(first, first + ROWS_AT_ONCE) for first in range(0, len(dense), ROWS_AT_ONCE)):
        result[part] = _refined(dense[part] * scale, matrix, inverse, keep[part], result[part])
    return result / scale


def _held_out(dense: Tensor, fit: Tensor, test: Tensor, keep: Tensor) -> list[float]:
    """Squared error of the rows' outputs per token of the fold that was not fitted, for every ridge."""
    errors: list[float] = []
    start = None
    for ridge in reversed(RIDGES):  # the solution for a larger ridge is the start for the next one
        solved = solve_restricted(dense, add_ridge(fit, ridge), keep, start)
        change = solved - dense
        errors.insert(0, float(((change @ test) * change).sum()) / float(test[-1, -1]))
        start = solved if bool(solved.isfinite().all()) else None
    return errors


def _refined(dense: Tensor, matrix: Tensor, inverse: Tensor, keep: Tensor, start: Tensor) -> Tensor:
    """Iterate from an initial solution until all rows have converged; the matrix has a unit diagonal."""
    x, kept, single = start.clone(), keep.float(), (matrix.float(), inverse.float())
    floor = FLOOR * ((dense @ matrix) * dense).sum(dim=1)
    index = torch.arange(len(dense), device=dense.device)
    for _ in range(ROUNDS):
        change = dense[index] - x[index]
        residual = change @ matrix
        loss = torch.maximum((change * residual).sum(dim=1), floor[index])
        residual *= keep[index]
        bound = ((residual @ inverse) * residual).sum(dim=1).abs()
        remaining = ~(bound <= EXCESS * loss)  # also if a step was not finite
        if not bool(remaining.any()):
            return x
        index, residual = index[remaining], residual[remaining]
        size = residual.norm(dim=1, keepdim=True)
        limit = EXCESS / 4 * loss[remaining, None] / size.square()
        step = _conjugate_gradients((residual / size).float(), kept[index], *single, limit.float())
        x[index] += size * step
    x[index] = _factorized(dense[index], matrix, keep[index])
    return x


def _conjugate_gradients(residual: Tensor, kept: Tensor, matrix: Tensor, inverse: Tensor, limit: Tensor) -> Tensor:
    """Solve for all rows at once until r^T M r of each is at most its limit (rows, 1)."""
    x = torch.zeros_like(residual)
    moved = (residual @ inverse) * kept
    direction = moved.clone()
    bound = (residual * moved).sum(dim=1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(ITERATIONS):
        product = (direction @ matrix) * kept
        step = bound / (direction * product).sum(dim=1, keepdim=True).clamp_min(tiny)
        x.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        torch.mm(residual, inverse, out=moved).mul_(kept)
        before, bound = bound, (residual * moved).sum(dim=1, keepdim=True)
        if bool((bound <= limit).all()):
            break
        direction.mul_(bound / before.clamp_min(tiny)).add_(moved)
    return x


def _factors_are_cheaper(keep: Tensor) -> bool:
    """Return whether Cholesky factors take less time than conjugate gradients."""
    (rows, width), most = keep.shape, int(keep.sum(dim=1).max())
    # both times in 0.1 ns, as measured on one AVX2 core (benchmarks/speed/obc_phases.py)
    return rows * most**2 * (most + 150) < 20 * rows * width**2 + 0.7 * width**3 + 3e7


def _factorized(dense: Tensor, matrix: Tensor, keep: Tensor) -> Tensor:
    """Solve every row by a Cholesky factor of the kept part of the matrix; NaN where it is not positive definite."""
    targets = dense @ matrix
    most = max(1, int(keep.sum(dim=1).max()))
    order = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    result = torch.zeros_like(dense)
    for part in row_chunks(len(dense), most, SOLVE_BYTES):
        indices = order[part]
        valid = keep[part].gather(1, indices).to(dense.dtype)
        matrices = matrix[indices[:, :, None], indices[:, None, :]]
        matrices *= valid[:, :, None] * valid[:, None, :]
        matrices.diagonal(dim1=1, dim2=2).add_(1 - valid)
        factor, info = torch.linalg.cholesky_ex(matrices)
        solved = torch.cholesky_solve((targets[part].gather(1, indices) * valid)[..., None], factor)[..., 0]
        result[part] = result[part].scatter(1, indices, torch.where(info[:, None] == 0, solved, torch.nan))
    return result


def row_chunks(rows: int, width: int, memory: int) -> Iterator[slice]:
    """Slice the rows so that the matrices of a slice fit into the memory; at least one row each."""
    size = max(1, memory // (BYTES_PER_ENTRY * width**2))
    return (slice(start, start + size) for start in range(0, rows, size))
