"""Elimination with rows of the factor computed ahead: the same order as one by one, and exact joint losses."""

import pytest
import torch
from torch import Tensor

from vitprune.criteria.obs import greedy


def rows(number: int, size: int) -> tuple[Tensor, Tensor]:
    """Return inverses (number, size, size) of correlated inputs' moments, and weights with zeros and ties."""
    generator = torch.Generator().manual_seed(size)
    mixing = torch.randn(number, size, size, generator=generator, dtype=torch.float64)
    moments = mixing @ mixing.mT / size + 0.05 * torch.eye(size).double()
    weights = torch.randn(number, size, generator=generator, dtype=torch.float64)
    weights[0, ::3] = 0
    weights[1, 1::2] = weights[1, ::2][: size // 2]
    return torch.linalg.inv(moments), weights


@pytest.mark.parametrize("size", [4, 63, 64, 66, 200])
@pytest.mark.parametrize("pattern", [None, (1, 2)])
def test_rows_computed_ahead_give_the_same_order(size: int, pattern: tuple[int, int] | None) -> None:
    size += size % 2
    inverse, weights = rows(3, size)
    for matrices in (inverse, inverse[:1].expand(3, -1, -1)):
        expected = greedy.eliminate_weights(matrices, weights, pattern=pattern)
        double = greedy.eliminate_weights(matrices, weights, pattern=pattern, ahead=torch.float64)
        assert torch.equal(double.argsort(dim=1, stable=True), expected.argsort(dim=1, stable=True))
        torch.testing.assert_close(double, expected, rtol=1e-10, atol=1e-13)
        single = greedy.eliminate_weights(matrices, weights, pattern=pattern, ahead=torch.float32)
        torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-7)


def test_equal_weights_and_more_ties_than_candidates() -> None:
    inverse = torch.eye(150).double().expand(2, -1, -1)
    weights = torch.ones(2, 150).double()
    for kind in (torch.float32, torch.float64):
        losses = greedy.eliminate_weights(inverse, weights, ahead=kind)
        torch.testing.assert_close(losses.sort(dim=1).values, (torch.arange(1, 151) / 2).double().expand(2, -1))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_losses_are_joint_losses_of_the_removed_weights(kind: torch.dtype) -> None:
    inverse, weights = rows(3, 100)
    losses = greedy.eliminate_weights(inverse, weights, ahead=kind)
    for row in range(3):
        ranked, order = losses[row].sort(stable=True)
        assert bool((ranked.diff()[int((weights[row] == 0).sum()) :] > 0).all())
        for number in (40, 70, 95):
            removed = order[:number][weights[row, order[:number]] != 0]
            joint = weights[row, removed] @ torch.linalg.solve(inverse[row][removed][:, removed], weights[row, removed])
            torch.testing.assert_close(ranked[number - 1], joint / 2, rtol=1e-4, atol=1e-9)


def test_results_are_bit_identical_for_any_number_of_threads() -> None:
    inverse, weights = rows(9, 80)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(greedy.eliminate_weights(inverse, weights, ahead=torch.float32))
    torch.set_num_threads(before)
    assert torch.equal(*results)
