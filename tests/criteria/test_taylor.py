"""Taylor scores against finite differences of the loss."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.support.model_zoo import batches, predict
from vitprune import find_groups, score
from vitprune.groups import Group, ParamSlice


def loss_when_scaled(model: torch.nn.Module, group: Group, unit: int, by: float, batch: tuple) -> float:
    """Return the loss with all parameters of a unit scaled by 1 + by."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for part in group.slices:
            tensor = model.get_parameter(part.param)
            if part.axis is None:
                tensor.view(-1)[unit] *= 1 + by
            else:
                shape = tensor.shape
                spread = tensor.movedim(part.axis, 0).reshape(part.outer, group.units, part.inner, -1).clone()
                spread[:, unit] *= 1 + by
                moved = spread.reshape(shape[part.axis], -1)
                rest = [size for axis, size in enumerate(shape) if axis != part.axis]
                tensor.copy_(moved.view(shape[part.axis], *rest).movedim(0, part.axis))
    return float(F.cross_entropy(predict(model, batch[0]), batch[1]))


@pytest.mark.parametrize("kind", ["weight", "ffn", "attention", "head", "residual"])
def test_taylor_is_the_squared_derivative_of_the_loss(vit: torch.nn.Module, kind: str) -> None:
    group = find_groups(vit, [kind])[-1]
    data, step = batches(vit), 1e-5
    result = score(vit, [group], "taylor", data)[group.name].flatten()
    for unit in range(0, group.units, max(1, group.units // 3)):
        grads = [
            (loss_when_scaled(vit, group, unit, step, b) - loss_when_scaled(vit, group, unit, -step, b)) / (2 * step)
            for b in data
        ]
        assert float(result[unit]) == pytest.approx(sum(grad**2 for grad in grads), rel=1e-4, abs=1e-18)


def test_a_weight_that_is_not_used_has_the_score_0(vit: torch.nn.Module) -> None:
    groups, data = find_groups(vit, ["weight"]), batches(vit)
    expected = score(vit, groups, "taylor", data)
    vit.spare = torch.nn.Linear(5, 4).double()
    spare = Group("spare.weight", "weight", (4, 5), (ParamSlice("spare.weight", None),))
    result = score(vit, [spare, *groups], "taylor", data)
    assert torch.equal(result.pop("spare.weight"), torch.zeros(4, 5, dtype=torch.float64))
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_taylor_works_on_frozen_parameters_and_under_no_grad(vit: torch.nn.Module) -> None:
    groups, data = find_groups(vit, ["ffn"]), batches(vit)
    expected = score(vit, groups, "taylor", data)
    vit.requires_grad_(False)
    with torch.no_grad():
        result = score(vit, groups, "taylor", data)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for p in vit.parameters())
