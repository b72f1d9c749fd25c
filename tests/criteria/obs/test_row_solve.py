"""Row solve: conjugate gradients and Cholesky factors against literal least squares."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vitprune.criteria.obs import row_solve
from vitprune.criteria.obs.row_solve import solve_restricted, solve_rows
from vitprune.criteria.obs.unit_elimination import add_ridge


def layer(rows: int, inputs: int, tokens: int, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs of the layer with a 1 appended and spectrum j^-power, and half of the weights kept."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64) ** -power
    read = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) * spectrum @ mixing + 0.5
    weights = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, inputs, generator=generator) > 0.5
    return weights, torch.cat([read, torch.ones(tokens, 1).double()], dim=1), keep


def literal(dense: Tensor, damped: Tensor, keep: Tensor) -> Tensor:
    """Solve the normal equations of every row."""
    result = torch.zeros_like(dense)
    for row, mask in enumerate(keep):
        result[row, mask] = torch.linalg.solve(damped[mask][:, mask], damped[mask] @ dense[row])
    return result


def by_factors(solve: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Solve all rows by Cholesky factors instead of conjugate gradients."""
    with monkeypatch.context() as patch:
        patch.setattr(row_solve, "_factors_are_cheaper", lambda keep: True)
        return solve()


@pytest.mark.parametrize(("rows", "power"), [(40, 0.3), (520, 0.3), (40, 0.45)])
def test_conjugate_gradients_equal_a_direct_solve(rows: int, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, read, keep = layer(rows, 200, 900, power)
    damped = add_ridge(read.T @ read, 1e-4)
    dense = torch.cat([weights, torch.zeros(rows, 1).double()], dim=1)
    kept = torch.cat([keep, torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    some = torch.arange(0, rows, 37)
    expected = literal(dense[some], damped, kept[some])
    result = solve_restricted(dense, damped, kept)
    with monkeypatch.context() as patch:
        patch.setattr(row_solve, "EXCESS", 1e-22)
        tight = solve_restricted(dense, damped, kept)
    exact = by_factors(lambda: solve_restricted(dense, damped, kept), monkeypatch)
    assert (tight[some] - expected).norm() < 1e-8 * expected.norm()
    assert bool((tight != exact).any())  # another algorithm
    assert not tight[~kept].any()
    torch.testing.assert_close(exact[some], expected, rtol=1e-8, atol=1e-10)
    losses = [((x - dense) @ damped * (x - dense)).sum(dim=1) for x in (result, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-8, atol=0)


def test_rows_that_do_not_converge_are_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, read, keep = layer(40, 200, 900, 6.0)  # condition number 1e12 after scaling
    matrix = read[:, :-1].T @ read[:, :-1]
    damped = matrix + 1e-13 * matrix.diagonal().mean() * torch.eye(200).double()
    result = solve_restricted(weights, damped, keep)
    exact = by_factors(lambda: solve_restricted(weights, damped, keep), monkeypatch)
    losses = [((x - weights) @ damped * (x - weights)).sum(dim=1) for x in (result, exact)]
    energy = ((weights @ damped) * weights).sum(dim=1)
    assert bool(((losses[0] - losses[1]).abs() < 1e-8 * losses[1] + 1e-12 * energy).all())


def test_fewer_tokens_than_inputs_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, read, keep = layer(48, 200, 120, 0.0)
    halves = torch.stack([read[half::2].T @ read[half::2] for half in (0, 1)])
    result = solve_rows(weights, halves, keep, True, "fc")
    exact = by_factors(lambda: solve_rows(weights, halves, keep, True, "fc"), monkeypatch)
    padded = torch.cat([weights, torch.zeros(48, 1).double()], dim=1)
    losses = [((x - padded) @ halves.sum(dim=0) * (x - padded)).sum() for x in (result, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


def test_rows_without_removed_or_kept_weights() -> None:
    weights, read, keep = layer(40, 200, 900, 0.3)
    keep[0], keep[1] = True, False
    weights[2] = 0
    halves = (read.T @ read)[None]
    result = solve_rows(weights, halves, keep, False, "fc")
    torch.testing.assert_close(result[0, :-1], weights[0], rtol=1e-9, atol=0)
    assert not result[1:3].any()
    assert bool(result.isfinite().all())


def test_scaling_the_inputs_does_not_change_the_outputs() -> None:
    weights, read, keep = layer(40, 200, 900, 0.3)
    units = torch.cat([torch.logspace(-4, 4, 200, dtype=torch.float64), torch.ones(1).double()])
    dense = torch.cat([weights, torch.zeros(40, 1).double()], dim=1)
    kept = torch.cat([keep, torch.ones(40, 1, dtype=torch.bool)], dim=1)
    damped = add_ridge(read.T @ read, 1e-4)
    expected = solve_restricted(dense, damped, kept)
    scaled = solve_restricted(1e-9 * dense / units, 1e12 * damped * units * units[:, None], kept)
    torch.testing.assert_close(scaled * units * 1e9, expected, rtol=1e-3, atol=1e-4)
