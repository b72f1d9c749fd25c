"""Greedy OBS elimination of the units of one consumer, and the ridge refit of the remaining ones."""

import torch
from torch import Tensor

RIDGES = tuple(10.0**-power for power in (6, 5, 4, 3, 2, 1))  # relative to the mean second moment of the inputs
COMPACT_EVERY = 64  # steps between two compactions of the working matrices


def eliminate_units(weight: Tensor, inputs: Tensor, metric: Tensor, inner: int, ridge: float) -> Tensor:
    """Remove units one by one, always the one with the least loss w_j^T G w_j / (2 [C^-1]_jj), and update the rest.

    Args:
        weight: Weight of the consumer, (o, k).
        inputs: Second moment C of its inputs with a 1 appended, (k+1, k+1).
        metric: Fisher metric G of its outputs, (o, o), per token.
        inner: Number of neighboring inputs per unit.
        ridge: Relative ridge of C, see `add_ridge`.

    Returns:
        Increments of the loss in nats, made monotone in the order of removal; (units,).

    Source: CAP (Kuznedelev et al. 2023) with units instead of weights.
    """
    units = weight.shape[1] // inner
    root = _root(metric)
    units_left = torch.arange(units)
    inverse = torch.linalg.inv(add_ridge(inputs, ridge))  # (k+1, k+1)
    carried = torch.cat([root.T @ weight.double(), torch.zeros(len(root), 1, dtype=torch.float64)], dim=1)
    nats = torch.full((units,), torch.inf, dtype=torch.float64)
    removed: list[int] = []
    level = 0.0
    for step in range(units):
        if len(removed) == COMPACT_EVERY or (removed and step == units - 1):
            units_left, inverse, carried = _compacted(units_left, inverse, carried, removed, inner)
            removed = []
        costs = _costs(carried, inverse, inner)
        costs[removed] = torch.inf
        index = int(costs.argmin())
        level = max(level * (1 + 1e-9), float(costs[index]) / 2)
        nats[units_left[index]] = level
        _remove(carried, inverse, slice(index * inner, (index + 1) * inner))
        removed.append(index)
    return nats


def ridge_refit(
    weight: Tensor, bias: Tensor | None, halves: Tensor, kept: Tensor, basis: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fit a consumer's dense output by ridge regression on its kept inputs.

    The ridge is the one of `RIDGES` with the least error on the fold of images that was not fitted.

    Args:
        weight: Dense weight, (o, k).
        bias: Dense bias, (o,); None for none.
        halves: Second moments of the inputs with a 1 appended, (folds, k+1, k+1).
        kept: Indices of the kept inputs.
        basis: Optional (k, k); kept inputs are then those of basis @ input.

    Returns:
        The new weight (o, k), zero for the removed inputs, and the new bias, in float64.
    """
    rotated, moments = _rotate(weight.double(), halves, basis)
    indices = kept if bias is None else torch.cat([kept, torch.tensor([moments.shape[-1] - 1])])
    folds = fit_and_test_moments(moments)
    errors = [sum(_held_out(rotated, fit, test, indices, ridge) for fit, test in folds) for ridge in RIDGES]
    ridge = RIDGES[int(torch.tensor(errors).argmin())]
    solved = _solve(rotated, moments.sum(dim=0), indices, ridge)
    full = torch.zeros(weight.shape, dtype=torch.float64).index_copy(1, kept, solved[:, : len(kept)])
    return full, None if bias is None else bias + solved[:, -1]


def add_ridge(inputs: Tensor, ridge: float) -> Tensor:
    """Return a second moment plus `ridge` times its mean diagonal; the constant input gets a negligible one."""
    mean = float(inputs.diagonal()[:-1].mean())
    extra = torch.full_like(inputs[0], max(ridge * mean, 1e-300))
    extra[-1] = 1e-9 * float(inputs[-1, -1])
    return inputs + torch.diag(extra)


def _rotate(weight: Tensor, halves: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dense weights (o, k+1) and moments in the basis in which inputs are kept or removed."""
    padded = torch.cat([weight, torch.zeros(len(weight), 1, dtype=torch.float64)], dim=1)
    if basis is None:
        return padded, halves
    full = torch.eye(len(basis) + 1, dtype=torch.float64)
    full[:-1, :-1] = basis
    return torch.linalg.solve(full.T, padded.T).T, full @ halves @ full.T


def fit_and_test_moments(halves: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (fit, test) moments for the choice of the ridge; the sum for both if a fold has no images."""
    if len(halves) < 2 or bool((halves[:, -1, -1] == 0).any()):
        return [(halves.sum(dim=0), halves.sum(dim=0))]
    return [(halves[0], halves[1]), (halves[1], halves[0])]


def _solve(weight: Tensor, inputs: Tensor, indices: Tensor, ridge: float) -> Tensor:
    damped = add_ridge(inputs, ridge)
    solved: Tensor = torch.linalg.solve(damped[indices][:, indices], damped[indices] @ weight.T).T
    return solved  # (o, kept + 1)


def _held_out(weight: Tensor, fit: Tensor, test: Tensor, indices: Tensor, ridge: float) -> float:
    """Squared error of the output per token of the fold that was not fitted."""
    change = weight.clone()
    change[:, indices] -= _solve(weight, fit, indices, ridge)
    return float(torch.einsum("oi,ij,oj->", change, test, change)) / float(test[-1, -1])


def _root(metric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(metric.double())
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _costs(carried: Tensor, inverse: Tensor, inner: int) -> Tensor:
    units = (carried.shape[1] - 1) // inner
    if inner == 1:
        diagonal = inverse.diagonal()[:-1].clamp_min(torch.finfo(torch.float64).tiny)
        single: Tensor = carried[:, :-1].square().sum(dim=0) / diagonal
        return single
    indices = torch.arange(units * inner).view(units, inner)
    blocks = inverse[indices[:, :, None], indices[:, None, :]]  # (units, inner, inner)
    columns = carried[:, :-1].T.reshape(units, inner, -1)  # (units, inner, o)
    joint: Tensor = (columns * torch.linalg.lstsq(blocks, columns, driver="gelsd").solution).sum(dim=(1, 2))
    return joint


def _remove(carried: Tensor, inverse: Tensor, index: slice) -> None:
    """Downdate the weights and the inverse for the removed inputs, in place."""
    rows = inverse[index].clone()  # (inner, k+1)
    share = torch.linalg.solve(rows[:, index], rows)  # (inner, k+1)
    carried -= carried[:, index].clone() @ share
    inverse -= rows.T @ share
    inverse[index, :] = 0
    inverse[:, index] = 0
    # the identity keeps the block invertible until the next compaction
    inverse[index, index] = torch.eye(len(rows), dtype=torch.float64)
    carried[:, index] = 0


def _compacted(
    units_left: Tensor, inverse: Tensor, carried: Tensor, removed: list[int], inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    remaining = torch.ones(len(units_left), dtype=torch.bool)
    remaining[removed] = False
    inputs = torch.cat([remaining.repeat_interleave(inner), torch.tensor([True])])
    return units_left[remaining], inverse[inputs][:, inputs].contiguous(), carried[:, inputs].contiguous()
