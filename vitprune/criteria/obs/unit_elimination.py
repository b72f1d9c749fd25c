"""Greedy OBS elimination of the units of one consumer, and the ridge refit of the remaining ones."""

import torch
from torch import Tensor

RIDGES = tuple(10.0**-power for power in (6, 5, 4, 3, 2, 1))  # relative to the mean second moment of the inputs
COMPACT_EVERY = 64  # removals that are applied together


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
    root = _root(metric)
    carried = torch.cat([root.T @ weight.double(), torch.zeros(len(root), 1, dtype=torch.float64)], dim=1)
    elimination = _Elimination(carried, torch.linalg.inv(add_ridge(inputs, ridge)), inner)
    nats = torch.full((weight.shape[1] // inner,), torch.inf, dtype=torch.float64)
    level = 0.0
    for _ in range(len(nats)):
        unit, cost = elimination.remove_cheapest()
        level = max(level * (1 + 1e-9), cost / 2)
        nats[unit] = level
    return nats


class _Elimination:
    """Weights (o, k+1) and inverse moment (k+1, k+1) of the inputs of the units that remain.

    Removals are collected: until the next compaction, which follows after `interval` removals, the weights are
    `carried - columns @ shares` and the inverse is `inverse - rows.T @ shares`. A removal then reads the matrices once,
    and does not write them.
    """

    def __init__(self, carried: Tensor, inverse: Tensor, inner: int) -> None:
        self._carried, self._inverse, self._inner = carried, inverse, inner
        self._units = torch.arange((carried.shape[1] - 1) // inner)
        self._interval = COMPACT_EVERY if inner == 1 else 1  # costs of wider units are read from the matrices
        self._start()

    def remove_cheapest(self) -> tuple[int, float]:
        """Remove the unit of the least cost w_j^T G w_j / [C^-1]_jj; return its number and the cost."""
        if self._removed and len(self._removed) in (self._interval, len(self._units) - 1):
            self._compact()
        costs = self._costs()
        costs[self._removed] = torch.inf
        index = int(costs.argmin())
        self._remove(index)
        return int(self._units[index]), float(costs[index])

    def _start(self) -> None:
        width, most = self._carried.shape[1], self._interval * self._inner
        self._removed: list[int] = []
        self._rows, self._shares = self._inverse.new_empty(most, width), self._inverse.new_empty(most, width)
        self._columns = self._carried.new_empty(len(self._carried), most)
        if self._inner == 1:
            self._energy = self._carried[:, :-1].square().sum(dim=0)
            self._diagonal = self._inverse.diagonal()[:-1].clone()

    def _costs(self) -> Tensor:
        if self._inner == 1:
            return self._energy / self._diagonal
        return _block_costs(self._carried, self._inverse, self._inner)

    def _remove(self, index: int) -> None:
        inner, start = self._inner, len(self._removed) * self._inner
        inputs, collected = slice(index * inner, (index + 1) * inner), slice(0, start)
        rows = self._inverse[inputs] - self._rows[collected, inputs].T @ self._shares[collected]  # (inner, k+1)
        share = torch.linalg.solve(rows[:, inputs], rows)
        columns = self._carried[:, inputs] - self._columns[:, collected] @ self._shares[collected, inputs]
        if inner == 1:
            products = columns.T @ self._carried - (columns.T @ self._columns[:, collected]) @ self._shares[collected]
            energy = columns.square().sum() * share.square() - 2 * share * products  # (1, k+1)
            self._energy = (self._energy + energy[0, :-1]).clamp_min(0)
            self._diagonal = (self._diagonal - (rows * share)[0, :-1]).clamp_min(torch.finfo(torch.float64).tiny)
        added = slice(start, start + inner)
        self._rows[added], self._shares[added], self._columns[:, added] = rows, share, columns
        self._removed.append(index)

    def _compact(self) -> None:
        """Apply the collected removals, and leave out the removed inputs."""
        remaining = torch.ones(len(self._units), dtype=torch.bool)
        remaining[self._removed] = False
        inputs = torch.cat([remaining.repeat_interleave(self._inner), torch.tensor([True])])
        number = len(self._removed) * self._inner
        rows, shares = self._rows[:number, inputs], self._shares[:number, inputs]
        self._inverse = torch.addmm(self._inverse[inputs][:, inputs], rows.T, shares, alpha=-1)
        self._carried = torch.addmm(self._carried[:, inputs], self._columns[:, :number], shares, alpha=-1)
        self._units = self._units[remaining]
        self._start()


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


def _block_costs(carried: Tensor, inverse: Tensor, inner: int) -> Tensor:
    """Return the costs of units of several inputs."""
    indices = torch.arange(carried.shape[1] - 1).view(-1, inner)
    blocks = inverse[indices[:, :, None], indices[:, None, :]]  # (units, inner, inner)
    columns = carried[:, :-1].T.reshape(len(indices), inner, -1)  # (units, inner, o)
    joint: Tensor = (columns * torch.linalg.lstsq(blocks, columns, driver="gelsd").solution).sum(dim=(1, 2))
    return joint
