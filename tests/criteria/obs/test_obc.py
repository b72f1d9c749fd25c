"""Optimal Brain Compression: row elimination and update against direct solves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.support.model_zoo import batches, images, predict, tiny
from tests.support.plans import context, plan_for
from vitprune import BadInput, ScoreConfig, find_groups, prune
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.obs.greedy import eliminate_weights, loss_increments
from vitprune.criteria.obs.obc import _restrict, _row_losses, obc
from vitprune.criteria.obs.row_solve import solve_rows
from vitprune.criteria.obs.unit_elimination import RIDGES
from vitprune.groups import Group, ParamSlice
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.pruning.select import select

WEIGHT = (ParamSlice("0.weight", None),)


class Plain(nn.Sequential):
    """A layer, its outputs averaged over positions, and a classifier."""

    def __init__(self, layer: nn.Module, outputs: int):
        super().__init__(layer, nn.Linear(outputs, 5))

    def forward(self, value: Tensor) -> Tensor:
        read = self[0](value)
        result: Tensor = self[1]((read.flatten(2).transpose(1, 2) if read.dim() == 4 else read).mean(dim=1))
        return result


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def case(
    layer: nn.Module, outputs: int, shape: tuple[int, ...]
) -> tuple[nn.Module, Group, list[tuple[Tensor, Tensor]]]:
    model = Plain(layer, outputs).double().eval()
    value = torch.randn((12, *shape), dtype=torch.float64)
    value = value + 0.7 * value.roll(1, dims=1) + 0.5
    group = Group("0.weight", "weight", tuple(model.get_parameter("0.weight").shape), WEIGHT)
    return model, group, [(value[:5], torch.zeros(5).long()), (value[5:], torch.zeros(7).long())]


def literal(row: Tensor, covariance: Tensor, steps: int) -> list[tuple[int, float]]:
    """Removed weight and cumulative loss of every step, by solving for every candidate."""
    removed: list[int] = []
    result = []
    for _ in range(steps):
        losses = {}
        for q in (q for q in range(len(row)) if q not in removed):
            out = torch.tensor([*removed, q])
            inner = torch.linalg.inv(covariance)[out][:, out]
            losses[q] = float(row[out] @ torch.linalg.solve(inner, row[out])) / 2
        best = min(losses, key=lambda q: losses[q])
        removed.append(best)
        result.append((best, losses[best]))
    return result


def test_row_elimination_equals_the_reference() -> None:
    model, group, data = case(nn.Linear(7, 4), 4, (9, 7))
    importance = obc(model, [group], data, DEFAULT_CONTEXT)
    read = torch.cat([value for value, _ in data]).reshape(-1, 7)
    moment = read.T @ read / len(read)
    moment += 1e-3 * moment.diagonal().mean() * torch.eye(7).double()
    covariance = moment - torch.outer(read.mean(dim=0), read.mean(dim=0))
    grad_sq = importance.statistics["0/metric_diagonal"] / 12
    for row, scores in enumerate(importance.scores["0.weight"]):
        weight = model.get_parameter("0.weight")[row].detach() * grad_sq[row].sqrt()
        expected = literal(weight, covariance, 5)
        order = scores.argsort().tolist()
        assert order[:5] == [index for index, _ in expected]
        increments = torch.tensor([loss for _, loss in expected]).double().diff(prepend=torch.zeros(1).double())
        torch.testing.assert_close(scores[order[:5]], increments.cummax(dim=0).values, rtol=1e-5, atol=1e-12)


def test_output_metric_equals_the_fisher_diagonal() -> None:
    model, group, data = case(nn.Linear(6, 3), 3, (4, 6))
    importance = obc(model, [group], data, context(fisher_directions=64))
    value = torch.cat([value for value, _ in data])
    read = model[0](value).detach().requires_grad_()
    logits = model[1](read.mean(dim=1))
    total = torch.zeros(3, dtype=torch.float64)
    for label in range(5):
        share = logits.softmax(dim=1)[:, label].detach()
        (grad,) = torch.autograd.grad(logits.log_softmax(dim=1)[:, label].sum(), read, retain_graph=True)
        total += (share[:, None, None] * grad.square()).sum(dim=(0, 1))
    torch.testing.assert_close(importance.statistics["0/metric_diagonal"], total, rtol=0.05, atol=0)


def test_the_update_is_least_squares_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    read = torch.randn((400, 6), generator=generator, dtype=torch.float64) @ torch.randn(6, 6).double() + 1
    ones = torch.cat([read, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    halves = torch.stack([ones[half::2].T @ ones[half::2] for half in (0, 1)])
    rows, keep = torch.randn(3, 6).double(), torch.rand((3, 6), generator=generator) > 0.5
    for constant in (True, False):
        result = solve_rows(rows, halves, keep, constant, "0.weight")
        for row in range(3):
            positions = [*keep[row].nonzero().flatten().tolist(), *([6] if constant else [])]
            expected = read @ rows[row]
            least = (
                (ones[:, positions] @ torch.linalg.lstsq(ones[:, positions], expected).solution - expected)
                .square()
                .sum()
            )
            assert (read @ result[row, :6] + result[row, 6] - expected).square().sum() <= 1.01 * least + 1e-6
            assert not result[row][[index for index in range(7) if index not in positions]].any()


def test_a_convolution_scores_like_its_unfolded_linear_layer() -> None:
    layer = nn.Conv2d(3, 4, 2, stride=2, padding=1).double()
    model, group, data = case(layer, 4, (3, 6, 6))
    importance = obc(model, [group], data, DEFAULT_CONTEXT)
    read = torch.cat([nn.functional.unfold(value, 2, 1, 1, 2).transpose(1, 2) for value, _ in data])
    flat = nn.Linear(12, 4).double()
    with torch.no_grad():
        flat.weight.copy_(layer.weight.flatten(1))
        flat.bias.copy_(layer.bias)
    same, other, _ = case(flat, 4, (1, 12))
    same[1].load_state_dict(model[1].state_dict())
    expected = obc(same, [other], [(read, torch.zeros(12).long())], DEFAULT_CONTEXT)
    result, target = importance.scores["0.weight"].flatten(1), expected.scores["0.weight"]
    torch.testing.assert_close(result, target, rtol=1e-6, atol=1e-12)
    masks = {"0.weight": result > result.median()}
    solved = importance.update({"0.weight": masks["0.weight"].view(4, 3, 2, 2)})
    torch.testing.assert_close(solved["0.weight"].flatten(1), expected.update(masks)["0.weight"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(solved["0.bias"], expected.update(masks)["0.bias"], rtol=1e-6, atol=1e-9)


def test_zero_weights_score_zero_and_remain_zero() -> None:
    model, group, data = case(nn.Linear(8, 4, bias=False), 4, (9, 8))
    with torch.no_grad():
        model[0].weight[:, [1, 4]] = 0
    importance = obc(model, [group], data, DEFAULT_CONTEXT)
    scores = importance.scores["0.weight"]
    assert not scores[:, [1, 4]].any()
    assert bool((scores[:, [0, 2, 3, 5, 6, 7]] > 0).all())
    smaller, _, _ = case(nn.Linear(6, 4, bias=False), 4, (9, 6))
    with torch.no_grad():
        smaller[0].weight.copy_(model[0].weight[:, [0, 2, 3, 5, 6, 7]])
        smaller[1].load_state_dict(model[1].state_dict())
    cut = [(value[..., [0, 2, 3, 5, 6, 7]], labels) for value, labels in data]
    alone = Group("0.weight", "weight", (4, 6), WEIGHT)
    expected = obc(smaller, [alone], cut, DEFAULT_CONTEXT).scores["0.weight"]
    torch.testing.assert_close(scores[:, [0, 2, 3, 5, 6, 7]], expected, rtol=0.05, atol=0)  # the ridge's mean differs


def test_rows_with_zeros_are_scored_with_several_threads() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(800, 160, generator=generator).double()
    moments, rows = inputs.T @ inputs / 800, torch.randn(6, 160, generator=generator).double()
    rows[:, ::3] = 0
    expected = [
        loss_increments(eliminate_weights(torch.linalg.inv(_restrict(moments, row[None] != 0)), row[None], None, None))
        for row in rows
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # torch's batched LU then has wrong results
    try:
        losses = _row_losses(rows, moments, DEFAULT_CONTEXT)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(losses, torch.cat(expected))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4)])
def test_n_of_m_weights_of_each_row_are_kept(pattern: tuple[int, int]) -> None:
    model = tiny("vit")
    data = batches(model)
    pruned = prune(
        model, "obc", calibration=data, example_input=images(model), scope=f"{pattern[0]}:{pattern[1]}"
    ).model
    for group in find_groups(pruned, ["weight"]):
        weight = pruned.get_parameter(group.name)
        assert bool(((weight.view(len(weight), -1, 4) != 0).sum(dim=2) == pattern[0]).all())


@pytest.mark.parametrize("kind", ["vit", "swin", "pvt"])
def test_logits_are_closer_to_dense_than_with_magnitude(kind: str) -> None:
    model = tiny(kind)
    data = batches(model)
    seen = data[0][0]
    dense = predict(model, seen)
    result = {
        method: predict(prune(model, method, sparsity=0.5, calibration=data).model, seen)
        for method in ("obc", "magnitude")
    }
    assert (result["obc"] - dense).norm() < 0.5 * (result["magnitude"] - dense).norm()
    assert select(obc(model, find_groups(model, ["weight"])[:1], data, DEFAULT_CONTEXT).scores, 0.5, "global")


def test_rows_need_a_positive_definite_moment() -> None:
    rows, keep = torch.ones(2, 3).double(), torch.ones(2, 3, dtype=torch.bool)
    nearly = torch.diag(torch.tensor([1.0, 1.0, -RIDGES[0] * 0.9, 1.0])).double()  # only larger ridges make it definite
    assert bool(solve_rows(rows, nearly[None], keep, True, "0.weight").isfinite().all())
    for moment in (-nearly, torch.full_like(nearly, torch.nan)):
        with pytest.raises(BadInput, match=r"^0.weight: obc cannot solve its rows, .*; check the weights and images"):
            solve_rows(rows, moment[None], keep, True, "0.weight")


def test_invalid_input_is_refused() -> None:
    model, _, data = case(nn.Conv2d(4, 4, 3, groups=2), 4, (4, 5, 5))
    group = Group("0.weight", "weight", (4, 2, 3, 3), WEIGHT)
    with pytest.raises(BadInput, match=r"^0.weight: obc needs a Linear layer or an ungrouped convolution; exclude"):
        obc(model, [group], data, DEFAULT_CONTEXT)
    vit = tiny("vit")
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: unstructured criteria score kind 'weight', not 'ffn'$"):
        obc(vit, find_groups(vit, ["ffn"]), batches(vit), DEFAULT_CONTEXT)
    with pytest.raises(BadInput, match=r"^second moments: need images; give calibration batches$"):
        obc(vit, find_groups(vit, ["weight"]), [], DEFAULT_CONTEXT)


def test_a_layer_that_runs_twice_is_refused() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.GELU(), layer)
    group = Group("0.weight", "weight", (6, 6), WEIGHT)
    with pytest.raises(BadInput, match=r"^0: runs more than once per forward pass; exclude it$"):
        obc(model, [group], [(torch.randn(4, 6), torch.zeros(4).long())], DEFAULT_CONTEXT)


def test_given_masks_refer_to_the_model_without_permutation() -> None:
    model = tiny("vit")
    data, masks = batches(model), {}
    for group in find_groups(model, ["weight"]):
        largest = model.get_parameter(group.name).detach().abs().view(-1, 4).topk(2, dim=1).indices
        masks[group.name] = (
            torch.zeros(group.units // 4, 4, dtype=torch.bool).scatter_(1, largest, True).view(group.shape)
        )
    results = []
    for score in (ScoreConfig(), ScoreConfig(permute=False)):
        pruned = copy.deepcopy(model)
        list(prune_cycles(pruned, plan_for("obc", scope="2:4", score=score), data, masks))
        results.append(predict(pruned, data[0][0]))
    assert torch.equal(*results)


@pytest.mark.parametrize("classes", [10, 200])
def test_images_that_cover_few_classes_are_reported(classes: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, classes)).eval()
    with torch.no_grad():
        model[1].bias[3] = 100  # the prediction for every image
    group = Group("0.weight", "weight", (4, 6), WEIGHT)
    obc(model, [group], [(torch.randn(50, 6), torch.zeros(50).long())], DEFAULT_CONTEXT)
    line = "warning: calibration: on these 50 images the model answers only 1 of its 200 classes"
    assert (line in capsys.readouterr().err) == (classes == 200)
