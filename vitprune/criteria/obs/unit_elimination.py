"""Structured greedy OBS and the closed-form refit: what one consumer's units are worth, and how the rest make up."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10.0**-power for power in (6, 5, 4, 3, 2, 1))  # relative to the mean second moment of the inputs
COMPACT = 64  # steps between two compactions of what greedy elimination carries along


@dataclass(frozen=True)
class Refit:
    """New weights of a consumer for the inputs that stay, and how much to add to its bias."""

    weight: Tensor  # (o, kept inputs)
    bias: Tensor  # (o,)


def eliminate(weight: Tensor, inputs: Tensor, metric: Tensor, inner: int, ridge: float) -> Tensor:
    """Remove one unit after the other, each time the one that costs least after the survivors have made up for it.

    weight (o, k), inputs (k+1, k+1) second moment with a 1 appended, metric (o, o) per token; a unit is `inner`
    neighbouring inputs. Returns the units' increments (units,) in nats, made to rise in the order of removal.

    Source: CAP (Kuznedelev et al. 2023) with units for weights: w_j^T G w_j / [C^-1]_jj, C^-1 and w downdated.
    """
    units = weight.shape[1] // inner
    root = _root(metric)
    left = torch.arange(units)
    inverse = torch.linalg.inv(damped(inputs, ridge))  # (k+1, k+1)
    carried = torch.cat([root.T @ weight.double(), torch.zeros(len(root), 1, dtype=torch.float64)], dim=1)
    nats = torch.full((units,), torch.inf, dtype=torch.float64)
    gone: list[int] = []
    level = 0.0
    for step in range(units):
        if len(gone) == COMPACT or (gone and step == units - 1):
            left, inverse, carried = _compacted(left, inverse, carried, gone, inner)
            gone = []
        costs = _costs(carried, inverse, inner)
        costs[gone] = torch.inf
        place = int(costs.argmin())
        level = max(level * (1 + 1e-9), float(costs[place]) / 2)
        nats[left[place]] = level
        _remove(carried, inverse, slice(place * inner, (place + 1) * inner))
        gone.append(place)
    return nats


def refit(weight: Tensor, halves: Tensor, kept: Tensor, constant: bool, basis: Tensor | None = None) -> Refit:
    """Least squares of a consumer's dense output on the inputs that stay, its ridge chosen on the other half's images.

    weight (o, k), halves (halves, k+1, k+1) second moments with a 1 appended, kept: indices of inputs that stay.
    `constant`: the consumer has a bias to refit. With `basis` (k, k) the inputs that stay are those of basis @ input.
    """
    turned, moments = _turned(weight.double(), halves, basis)
    places = torch.cat([kept, torch.tensor([moments.shape[-1] - 1])]) if constant else kept
    errors = [sum(_held_out(turned, a, b, places, ridge) for a, b in pairs(moments)) for ridge in RIDGES]
    ridge = RIDGES[int(torch.tensor(errors).argmin())]
    solved = _solve(turned, moments.sum(dim=0), places, ridge)
    return Refit(solved[:, : len(kept)], solved[:, len(kept) :].sum(dim=1))


def damped(inputs: Tensor, ridge: float) -> Tensor:
    """Second moment with a ridge relative to its mean diagonal; the constant's own is next to nothing."""
    mean = float(inputs.diagonal()[:-1].mean())
    extra = torch.full_like(inputs[0], max(ridge * mean, 1e-300))
    extra[-1] = 1e-9 * float(inputs[-1, -1])
    return inputs + torch.diag(extra)


def _turned(weight: Tensor, halves: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense weights (o, k+1) and moments in the basis in which inputs stay or go."""
    padded = torch.cat([weight, torch.zeros(len(weight), 1, dtype=torch.float64)], dim=1)
    if basis is None:
        return padded, halves
    full = torch.eye(len(basis) + 1, dtype=torch.float64)
    full[:-1, :-1] = basis
    return torch.linalg.solve(full.T, padded.T).T, full @ halves @ full.T


def pairs(halves: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a ridge is fitted to and tried on; with no images in one half, both are all."""
    if len(halves) < 2 or bool((halves[:, -1, -1] == 0).any()):
        return [(halves.sum(dim=0), halves.sum(dim=0))]
    return [(halves[0], halves[1]), (halves[1], halves[0])]


def _solve(weight: Tensor, inputs: Tensor, places: Tensor, ridge: float) -> Tensor:
    whole = damped(inputs, ridge)
    solved: Tensor = torch.linalg.solve(whole[places][:, places], whole[places] @ weight.T).T
    return solved  # (o, kept + 1)


def _held_out(weight: Tensor, fitted: Tensor, tried: Tensor, places: Tensor, ridge: float) -> float:
    """Squared error of the output, per token of the images that were not fitted to."""
    change = weight.clone()
    change[:, places] -= _solve(weight, fitted, places, ridge)
    return float(torch.einsum("oi,ij,oj->", change, tried, change)) / float(tried[-1, -1])


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
    places = torch.arange(units * inner).view(units, inner)
    blocks = inverse[places[:, :, None], places[:, None, :]]  # (units, inner, inner)
    columns = carried[:, :-1].T.reshape(units, inner, -1)  # (units, inner, o)
    joint: Tensor = (columns * torch.linalg.lstsq(blocks, columns, driver="gelsd").solution).sum(dim=(1, 2))
    return joint


def _remove(carried: Tensor, inverse: Tensor, place: slice) -> None:
    """Downdate the weights and the inverse for the inputs that go, in place."""
    rows = inverse[place].clone()  # (inner, k+1)
    share = torch.linalg.solve(rows[:, place], rows)  # (inner, k+1)
    carried -= carried[:, place].clone() @ share
    inverse -= rows.T @ share
    size = rows.shape[0]
    inverse[place, :] = 0
    inverse[:, place] = 0
    inverse[place, place] = torch.eye(size, dtype=torch.float64)  # keeps the block solvable until it is cut out
    carried[:, place] = 0


def _compacted(
    left: Tensor, inverse: Tensor, carried: Tensor, gone: list[int], inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    alive = torch.ones(len(left), dtype=torch.bool)
    alive[gone] = False
    inputs = torch.cat([alive.repeat_interleave(inner), torch.tensor([True])])
    return left[alive], inverse[inputs][:, inputs].contiguous(), carried[:, inputs].contiguous()
