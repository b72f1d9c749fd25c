"""Channel permutation: the function does not change, and the loss at the same N:M pattern is lower."""

import copy
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from tests.support.model_zoo import batches, images, predict, state, tiny
from tests.support.plans import context
from vitprune import BadInput, ScoreConfig, find_groups, prune
from vitprune.criteria.moments import collect_layer_moments
from vitprune.criteria.obs.channel_permutation import (
    ChannelOrders,
    LayerLoss,
    assign_runs,
    channel_orders,
    pair_costs,
    permute_statistics,
    single_costs,
)
from vitprune.criteria.obs.obc import obc
from vitprune.groups import Group, permute


def drawn_orders(groups: list[Group], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    for group in groups:
        heads = group.shape[0] if len(group.shape) > 1 else 1
        units = group.units // heads
        parts = [torch.randperm(units, generator=generator) + head * units for head in range(heads)]
        orders[group.name] = torch.cat(parts)
    return orders


def inverse(orders: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: order.argsort() for name, order in orders.items()}


@pytest.mark.parametrize("kind", ["ffn", "attention", "head", "residual"])
@pytest.mark.parametrize("name", ["vit", "distilled", "odd", "extra", "swin", "pvt"])
def test_a_permutation_does_not_change_the_function(name: str, kind: str) -> None:
    model = tiny(name)
    groups = find_groups(model, [kind])
    orders = drawn_orders(groups)
    other = permute(copy.deepcopy(model), groups, orders)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    torch.testing.assert_close(predict(other, images(model)), predict(model, images(model)), rtol=0, atol=1e-12)
    back = permute(other, groups, inverse(orders))
    assert all(torch.equal(value, state(back)[key]) for key, value in state(model).items())


def test_an_order_that_is_not_a_permutation_is_refused_without_changes() -> None:
    model = tiny("vit")
    before = copy.deepcopy(state(model))
    ffn, attention = find_groups(model, ["ffn"]), find_groups(model, ["attention"])
    for groups, order in ((ffn, torch.zeros(192).long()), (attention, torch.arange(48).flip(0))):
        good = drawn_orders(groups)
        with pytest.raises(BadInput, match=rf"^{groups[-1].name}: its order is not a permutation of"):
            permute(model, groups, good | {groups[-1].name: order})
    assert all(torch.equal(value, state(model)[key]) for key, value in before.items())


def halves(every: int) -> list[list[int]]:
    """Return all orders of 2 M columns as two runs."""
    return [[*one, *(set(range(2 * every)) - set(one))] for one in combinations(range(2 * every), every)]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 2)])
def test_runs_by_single_losses_are_close_to_the_optimum(pattern: tuple[int, int]) -> None:
    keep, every = pattern

    def cost(single: Tensor, order: list[int]) -> float:
        runs = single[:, order].view(len(single), -1, every)
        return float(runs.topk(every - keep, dim=2, largest=False).values.sum())

    total, least, before = 0.0, 0.0, 0.0
    for seed in range(8):
        single = torch.rand((5, 2 * every), generator=torch.Generator().manual_seed(seed)).double().square()
        order = assign_runs(single.sum(dim=0), single_costs(single, pattern), every).tolist()
        assert sorted(order) == list(range(2 * every))
        total += cost(single, order)
        before += cost(single, list(range(2 * every)))
        least += min(cost(single, split) for split in halves(every))
    assert least <= total <= 1.1 * least
    assert total < before


def test_runs_by_joint_losses_are_close_to_the_optimum() -> None:
    def cost(rows: Tensor, inverse: Tensor, order: list[int]) -> float:
        total = 0.0
        for run in (order[:4], order[4:]):
            for row in rows:
                pairs = (torch.tensor(pair) for pair in combinations(run, 2))
                total += min(float(row[p] @ torch.linalg.solve(inverse[p][:, p], row[p])) / 2 for p in pairs)
        return total

    total, least, before = 0.0, 0.0, 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        rows, root = (torch.randn((n, 8), generator=generator).double() for n in (5, 8))
        inverse = root @ root.T + 0.1 * torch.eye(8)
        order = assign_runs(rows.square().sum(dim=0), pair_costs(rows, inverse), 4).tolist()
        assert sorted(order) == list(range(8))
        total += cost(rows, inverse, order)
        before += cost(rows, inverse, list(range(8)))
        least += min(cost(rows, inverse, split) for split in halves(4))
    assert least <= total <= 1.15 * least
    assert total < before


def test_moments_are_those_of_the_permuted_model() -> None:
    model = tiny("vit")
    data = batches(model)
    paths = [group.name.removesuffix(".weight") for group in find_groups(model, ["weight"])]
    groups = [group for kind in ("ffn", "attention", "residual") for group in find_groups(model, [kind])]
    orders = drawn_orders(groups)
    collected = collect_layer_moments(model, paths, [], data, context(fisher_directions=64), "metric_diagonal")
    other = permute(copy.deepcopy(model), groups, orders)
    expected = collect_layer_moments(other, paths, [], data, context(fisher_directions=64), "metric_diagonal")
    result = permute_statistics(collected, ChannelOrders(groups, orders))
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_the_loss_is_lower_and_the_pattern_is_exact(name: str) -> None:
    model = tiny(name)
    data = batches(model)
    groups = find_groups(model, ["weight"])
    errors = {}
    for permuted in (False, True):
        importance = obc(model, groups, data, context(pattern=(2, 4), permute=permuted))
        lost = [score[score.isfinite()].sum() for score in importance.scores.values()]
        errors[permuted] = float(torch.stack(lost).sum())
        assert bool(importance.orders) == permuted
        pruned = prune(model, "obc", scope="2:4", calibration=data, config=ScoreConfig(permute=permuted)).model
        for group in find_groups(pruned, ["weight"]):
            weight = pruned.get_parameter(group.name)
            assert bool(((weight.view(len(weight), -1, 4) != 0).sum(dim=2) == 2).all())
        if permuted:  # only zeros and refitted weights differ from the dense model
            assert pruned.state_dict().keys() == model.state_dict().keys()
    assert errors[True] < errors[False]


def test_channels_that_cannot_be_permuted_keep_their_order() -> None:
    model = tiny("vit")
    losses = {}
    for group in find_groups(model, ["weight"]):
        weight = model.get_parameter(group.name).detach()
        losses[group.name] = LayerLoss(weight, torch.eye(weight.shape[1]).double())
    assert {group.kind for group in channel_orders(model, losses, (2, 4), images(model)).groups} == {
        "ffn",
        "attention",
        "residual",
    }
    assert {group.kind for group in channel_orders(model, losses, (1, 4), images(model)).groups} == {"ffn", "attention"}
    model.register_parameter("scale", nn.Parameter(torch.linspace(1, 2, 48).double()))  # of channels, in no slice
    model.blocks[0].norm1.register_forward_hook(lambda module, args, output: output * model.scale)
    assert "residual" not in {group.kind for group in channel_orders(model, losses, (2, 4), images(model)).groups}
