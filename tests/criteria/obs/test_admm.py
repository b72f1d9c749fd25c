"""Supports of N:M patterns by ADMM, against greedy elimination and the best of all supports."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from vitprune.criteria.obs.admm import nm_support
from vitprune.criteria.obs.greedy import eliminate_weights


def problem(inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a second moment of correlated inputs, and rows."""
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn((20 * inputs, inputs), generator=generator).double()
    read = read @ torch.randn((inputs, inputs), generator=generator).double()
    moments = read.T @ read / len(read)
    moments += 1e-3 * moments.diagonal().mean() * torch.eye(inputs)
    return moments, torch.randn((outputs, inputs), generator=generator).double()


def loss(moments: Tensor, row: Tensor, keep: Tensor) -> float:
    """Squared error of a row per input after its weights are solved on the support."""
    solved = torch.zeros_like(row)
    solved[keep] = torch.linalg.solve(moments[keep][:, keep], (moments @ row)[keep])
    return float((row - solved) @ moments @ (row - solved))


@pytest.mark.parametrize(("keep", "every"), [(2, 4), (1, 4), (4, 8)])
def test_the_loss_is_below_greedy_elimination(keep: int, every: int) -> None:
    total = {"admm": 0.0, "greedy": 0.0}
    for seed in range(4):
        moments, rows = problem(48, 8, seed)
        support = nm_support(moments, rows, (keep, every))
        assert bool((support.view(8, -1, every).sum(dim=2) == keep).all())
        inverse = torch.linalg.inv(moments).expand(len(rows), -1, -1)
        greedy = eliminate_weights(inverse, rows, pattern=(keep, every)).isinf()
        for number, row in enumerate(rows):
            total["admm"] += loss(moments, row, support[number].nonzero().flatten())
            total["greedy"] += loss(moments, row, greedy[number].nonzero().flatten())
    assert total["admm"] < 0.95 * total["greedy"]


def test_the_loss_of_small_rows_is_at_most_1_5_times_the_smallest() -> None:
    total, least = 0.0, 0.0
    for seed in range(6):
        moments, rows = problem(8, 4, seed)
        support = nm_support(moments, rows, (2, 4))
        choices = [[*a, *b] for a, b in product(combinations(range(4), 2), combinations(range(4, 8), 2))]
        total += sum(loss(moments, row, keep.nonzero().flatten()) for row, keep in zip(rows, support, strict=True))
        least += sum(min(loss(moments, row, torch.tensor(choice)) for choice in choices) for row in rows)
    assert least <= total <= 1.5 * least


def test_without_correlation_the_largest_contributions_are_kept() -> None:
    moments = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0] * 2)).double()
    rows = torch.tensor([[4.0, 1.5, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]]).double()
    expected = [[True, True, False, False, False, False, True, True]]
    assert nm_support(moments, rows, (2, 4)).tolist() == expected


def test_scaled_inputs_have_the_same_support() -> None:
    moments, rows = problem(16, 5, 0)
    scale = torch.logspace(-3, 3, 16, dtype=torch.float64)
    expected = nm_support(moments, rows, (2, 4))
    assert torch.equal(nm_support(moments * torch.outer(scale, scale), rows / scale, (2, 4)), expected)
