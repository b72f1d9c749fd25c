"""CAP: greedy elimination in Fisher blocks against reference loops and closed forms."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.model_zoo import batches, images, tiny
from tests.support.plans import changed, plan_for
from tests.support.reference_obs import (
    SMALL,
    block_loss,
    closed_form,
    cost,
    image_gradients,
    matrices,
    naive_fisher,
    right_looking,
    sherman_morrison,
)
from vitprune import find_groups
from vitprune.criteria.obs import cap, greedy
from vitprune.criteria.obs.fisher_blocks import invert_blocks, solve_independently, solve_jointly
from vitprune.evaluation.accuracy import accuracy
from vitprune.groups import Masks
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.pruning.select import select

METHODS = ["ovit", "ovit-increments", "woodfisher", "woodfisher-joint", "magnitude-obs", "fastcap"]


def spread(size: int, condition: float, blocks: int = 3, seed: int = 0) -> Tensor:
    """Symmetric matrices with eigenvalues from 1 down to 1 / condition; (blocks, B, B) float64."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(blocks, size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return turns @ torch.diag(values) @ turns.mT


def drawn(blocks: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(blocks, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(fisher: Tensor, removed: Tensor) -> Tensor:
    """Fisher blocks whose removed weights have no gradients."""
    remaining = fisher * (~removed)[:, :, None] * (~removed)[:, None, :]
    remaining.diagonal(dim1=1, dim2=2).add_(1e-6 * removed)
    return remaining


def test_elimination_of_two_by_two_blocks_by_hand() -> None:
    """For F = [[2, 1], [1, 2]], the inverse's diagonal is 2/3; w = 1 is removed first, at loss 1/2 * 1 / (2/3)."""
    fisher = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[4.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    losses = greedy.eliminate_weights(invert_blocks(fisher), weights)
    # first block: 0.75, then the other: w^T F w / 2 = (2 + 18 + 6) / 2; second: independent, 1/2 and 1/2 + 4/2
    torch.testing.assert_close(losses, torch.tensor([[0.75, 13.0], [2.5, 0.5]], dtype=torch.float64))
    keep = torch.tensor([[False, True], [True, False]])
    new = solve_jointly(fisher, weights, keep)
    torch.testing.assert_close(new, torch.tensor([[0.0, 3.5], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_the_inverse_equals_sherman_morrison(condition: float) -> None:
    size = 24
    factor = torch.linalg.cholesky(spread(size, condition / 100)[0])
    gradients = drawn(200, size) @ factor.mT
    damp = 1 / condition
    fisher = gradients.T @ gradients / 200 + damp * torch.eye(size, dtype=torch.float64)
    result = invert_blocks(fisher[None])[0].diagonal()
    for expected in (torch.linalg.inv(fisher).diagonal(), sherman_morrison(gradients, damp).diagonal()):
        torch.testing.assert_close(result / expected, torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("on", ["numba", "torch"])
@pytest.mark.parametrize("runs", [None, (2, 4), (1, 4), (5, 8)])
def test_elimination_equals_the_right_looking_reference(
    on: str, runs: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "has_numba", lambda: on == "numba")
    fisher, weights = spread(24, 1e5, blocks=5), drawn(5, 24)
    weights[0, 3:9], weights[1, ::4], weights[2, :] = 0, 0, 0
    fisher = alone(fisher, weights == 0)
    losses = greedy.eliminate_weights(invert_blocks(fisher), weights, pattern=runs)
    for block in range(len(fisher)):
        expected, trace, order = right_looking(fisher[block], weights[block], runs)
        torch.testing.assert_close(losses[block], expected, rtol=1e-8, atol=1e-300)
        result = [q for q in losses[block].argsort(stable=True).tolist() if losses[block, q] < torch.inf]
        assert result == order
        zeros = int((weights[block] == 0).sum())
        for count in range(zeros, len(order) + 1):  # after any number of steps, the result equals one joint solve
            keep = torch.ones(24, dtype=torch.bool)
            keep[order[:count]] = False
            new = solve_jointly(fisher[block : block + 1], weights[block : block + 1], keep[None])[0]
            torch.testing.assert_close(new, trace[count - zeros], rtol=1e-6, atol=1e-6)


def test_losses_equal_the_closed_form() -> None:
    fisher, weights = spread(32, 1e4, blocks=2), drawn(2, 32)
    losses = greedy.eliminate_weights(invert_blocks(fisher), weights)
    assert bool((losses.sort(dim=1).values.diff(dim=1) > 0).all())
    for block in range(2):
        order = losses[block].argsort()
        for count in (1, 7, 16, 31):
            keep = torch.ones(32, dtype=torch.bool)
            keep[order[:count]] = False
            new, loss = closed_form(fisher[block], weights[block], keep)
            assert float(losses[block, order[count - 1]]) == pytest.approx(loss, rel=1e-8)
            assert block_loss(fisher[block], new - weights[block]) == pytest.approx(loss, rel=1e-8)
            solved = solve_jointly(fisher[block][None], weights[block][None], keep[None])[0]
            torch.testing.assert_close(solved, new, rtol=1e-6, atol=1e-6)


def test_masks_are_prefixes_of_every_block_and_reach_the_exact_count(vit: nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    scores = cap.ovit(vit, groups, batches(vit), SMALL).scores
    masks = select(scores, 0.37, "global", groups)
    units = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.37 * units)
    for name, mask in masks.items():
        ranked = scores[name].view(-1, 24).argsort(dim=1)
        kept = mask.view(-1, 24).gather(1, ranked)
        assert bool((kept.int().diff(dim=1) >= 0).all())


def test_scores_equal_the_reference_loops(vit: nn.Module) -> None:
    groups, data = find_groups(vit, ["weight"])[1:3], batches(vit)
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight[::3, 4] = 0
    result = {name: f(vit, groups, data, SMALL).scores for name, f in CRITERIA.items()}
    for group in groups:
        weights = vit.get_parameter(group.name).detach().view(-1, 24)
        fisher = naive_fisher(image_gradients(vit, group.name, data), 24, SMALL.config.damping * 128)
        for block in range(0, len(weights), 17):
            losses = right_looking(fisher[block], weights[block])[0]
            alone = weights[block] ** 2 / torch.linalg.inv(fisher[block]).diagonal() / 2
            diagonal = weights[block] ** 2 * fisher[block].diagonal() / 2
            for name, expected in (("ovit", losses), ("woodfisher", alone), ("diagonal", diagonal)):
                score = result[name][group.name].view(-1, 24)[block]
                torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-300)


CRITERIA = {"ovit": cap.ovit, "woodfisher": cap.woodfisher, "diagonal": cap.fisher_diagonal}


def test_blocks_of_one_weight_are_the_diagonal(vit: nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    alone = changed(SMALL, fisher_block_size=1)
    expected = cap.fisher_diagonal(vit, groups, batches(vit), SMALL).scores
    for criterion in (cap.ovit, cap.woodfisher, cap.ovit_increments):
        result = criterion(vit, groups, batches(vit), alone).scores
        for name, score in expected.items():
            torch.testing.assert_close(result[name], score, rtol=1e-9, atol=1e-300)


def test_ovit_masks_and_update_have_the_least_loss(vit: nn.Module) -> None:
    data = batches(vit, 4)
    (group,) = find_groups(vit, ["weight"])[3:4]
    fisher, weights = matrices(vit, data=data)[group.name], vit.get_parameter(group.name).detach().view(-1, 24)
    scores = {name: f(vit, [group], data, SMALL).scores for name, f in CRITERIA.items()}
    keep = {name: select(score, 0.6)[group.name].view(-1, 24) for name, score in scores.items()}
    best = {name: cost(fisher, weights, solve_jointly(fisher, weights, mask)) for name, mask in keep.items()}
    singly = cost(fisher, weights, solve_independently(fisher, weights, keep["woodfisher"]))
    assert best["ovit"] < best["woodfisher"] < singly
    assert best["diagonal"] < cost(fisher, weights, weights * keep["diagonal"])
    promised = scores["ovit"][group.name].view(-1, 24).masked_fill(keep["ovit"], 0).amax(dim=1).sum()
    assert best["ovit"] == pytest.approx(float(promised), rel=1e-6)


def test_ranking_by_increments_has_no_more_loss_than_cumulative_losses() -> None:
    fisher, weights = spread(24, 1e4, blocks=40), drawn(40, 24)
    losses = greedy.eliminate_weights(invert_blocks(fisher), weights)
    added = greedy.loss_increments(losses)
    ranked = losses.argsort(dim=1)
    assert bool((added.gather(1, ranked).diff(dim=1) >= 0).all())
    costs = [
        sum(
            float(row[~keep].max())
            for row, keep in zip(losses, select({"": s}, 0.5)[""], strict=True)
            if not keep.all()
        )
        for s in (losses, added)
    ]
    assert costs[1] <= costs[0]


def test_scaling_gradients_and_damping_together_scales_losses_only(vit: nn.Module) -> None:
    fisher, weights = spread(24, 1e5), drawn(3, 24)
    losses, scaled = (greedy.eliminate_weights(invert_blocks(f), weights) for f in (fisher, 1e-5 * fisher))
    torch.testing.assert_close(scaled, 1e-5 * losses, rtol=1e-9, atol=0)
    keep = losses > losses.median()
    one, other = (solve_jointly(f, weights, keep) for f in (fisher, 1e-5 * fisher))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_cycle_keeps_the_zeros_of_the_first(method: str) -> None:
    """The accuracy is close to the dense one, unlike with the released code."""
    model = tiny("vit")
    data = [(x, model(x).argmax(1)) for x in (images(model, 8, seed) for seed in range(3))]
    groups = find_groups(model, ["weight"])
    dense = {group.name: model.get_parameter(group.name).detach().clone() for group in groups}
    before: Masks = {}
    plan = plan_for(method, 0.5, cycles=2, schedule="linear", score=SMALL.config)
    for cycle in prune_cycles(model, plan, data):
        removed = {name: model.get_parameter(name) == 0 for name in dense}
        assert all(torch.equal(removed[name], ~cycle.masks[name]) for name in dense)
        assert all(bool(removed[name][~mask].all()) for name, mask in before.items())
        before = cycle.masks
    zeros = sum(int((~mask).sum()) for mask in before.values())
    assert zeros == sum(weight.numel() for weight in dense.values()) // 2
    moved = [not torch.equal(model.get_parameter(n)[m], dense[n][m]) for n, m in before.items()]
    assert any(moved)
    assert accuracy(model, data)[0]["top1"] > 60


def test_a_zero_weight_is_decoupled_in_the_inverse(vit: nn.Module) -> None:
    """Its row of the inverse is the unit vector divided by the damping."""
    name = "blocks.0.attn.proj.weight"
    with torch.no_grad():
        vit.get_parameter(name)[:, 1::2] = 0
    fisher = matrices(vit)[name]
    removed = (vit.get_parameter(name) == 0).view(-1, 24)
    result = invert_blocks(fisher)
    unit = torch.eye(24, dtype=torch.float64) / (SMALL.config.damping * 128)
    for block in range(0, len(result), 11):
        torch.testing.assert_close(result[block][removed[block]], unit[removed[block]], rtol=1e-9, atol=1e-9)
