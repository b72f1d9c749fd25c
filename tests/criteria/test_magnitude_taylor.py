"""What a unit is worth: each criterion against its definition."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.support.reference_kl import kl, lamp, literal_vit, naive_masks
from tests.support.tiny_models import answer, batches, images, same_state, state, tiny
from vitprune import CRITERIA, METHODS, BadInput, find_groups, score
from vitprune.criteria import magnitude as by_weights
from vitprune.groups import Group, ParamSlice
from vitprune.pruning.select import select

KINDS = {"random": "ffn", "magnitude": "ffn", "energy": "weight", "taylor": "ffn", "kl-literal": "head"}


class OneLayer(torch.nn.Module):
    """A bare parameter, to score by hand."""

    def __init__(self, values: list[float]):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def energy_of(values: list[float]) -> list[float]:
    group = Group("w", "weight", (len(values),), (ParamSlice("w", None),))
    return score(OneLayer(values), [group], "energy")["w"].tolist()


def test_energy_by_hand() -> None:
    # 9/9, 1/(9+4+1), 4/(9+4); DIMAP, equation 10
    assert energy_of([3.0, -1.0, 2.0]) == pytest.approx([1.0, 0.0714, 0.3077], abs=5e-5)
    assert energy_of([3.0, -1.0, 2.0]) == pytest.approx([1, 1 / 14, 4 / 13], abs=1e-15)


def test_energy_of_zeros_and_ties() -> None:
    assert energy_of([0.0, 0.0]) == [0.0, 0.0]
    assert energy_of([0.0, 2.0, 0.0, 2.0]) == [0.0, 0.5, 0.0, 1.0]  # of equal weights the first goes first
    assert energy_of([1e-200]) == [0.0]  # its square is zero in float64


def test_energy_is_lamp(vit: torch.nn.Module) -> None:
    for group in find_groups(vit, ["weight"]):
        found = score(vit, [group], "energy")[group.name]
        torch.testing.assert_close(found, lamp(vit.get_parameter(group.name).detach()), rtol=1e-12, atol=0)


def test_energy_invariants(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    with torch.no_grad():
        vit.get_parameter(groups[0].name)[:, :7] = 0
    before = score(vit, groups, "energy")
    for group in groups:
        weight = vit.get_parameter(group.name).detach().abs().flatten()
        own = before[group.name].flatten()
        assert float(own.max()) == 1.0
        assert torch.equal(own == 0, weight == 0)
        assert bool((own[weight.argsort(stable=True)].diff() >= 0).all())
    masks = select(before, 0.4, "global")
    with torch.no_grad():
        for power, group in enumerate(groups):
            vit.get_parameter(group.name).mul_((-1) ** power * 2.0**power)
    assert all(torch.equal(mask, masks[n]) for n, mask in select(score(vit, groups, "energy"), 0.4).items())


def test_energy_keeps_its_precision_in_float32() -> None:
    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    model = OneLayer([0.0])
    model.w = torch.nn.Parameter(weight)
    found = score(model, [Group("w", "weight", (200_000,), (ParamSlice("w", None),))], "energy")["w"]
    order = weight.abs().argsort(stable=True).flip(0)
    squares = weight.double().square()[order]
    torch.testing.assert_close(found[order], squares / squares.cumsum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_energy_is_the_same_whatever_the_weights_are_kept_in(dtype: torch.dtype) -> None:
    coarse = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(8).round().div(8)  # many ties, and zeros
    values = torch.cat([coarse, torch.tensor([-0.0, 2.0**-24, -(2.0**-24)])]).to(dtype)
    model = OneLayer([0.0])
    model.w = torch.nn.Parameter(values)
    found = score(model, [Group("w", "weight", (len(values),), (ParamSlice("w", None),))], "energy")["w"]
    largest_first = sorted(range(len(values)), key=lambda at: (abs(float(values[at])), at), reverse=True)
    total = 0.0
    for at in largest_first:
        total += float(values[at]) ** 2
        assert float(found[at]) == pytest.approx(float(values[at]) ** 2 / total, rel=1e-12)


def test_one_pool_of_energy_is_lamp_of_those_layers(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    scores = {g.name: lamp(vit.get_parameter(g.name).detach()) for g in groups}
    units = sum(g.units for g in groups)
    expected = naive_masks(scores, round(0.45 * units))
    masks = select(score(vit, groups, "energy"), 0.45, "global")
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_energy_is_for_single_weights(vit: torch.nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: the energy score is for single weights"):
        score(vit, find_groups(vit, ["ffn"]), "energy")


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_magnitude_is_the_norm_of_the_rows_that_produce_a_unit(name: str) -> None:
    model = tiny(name)
    weights, ffn, heads, channels = (find_groups(model, [kind])[0] for kind in ("weight", "ffn", "head", "attention"))
    found = score(model, [weights, ffn, heads, channels], "magnitude")
    torch.testing.assert_close(found[weights.name], model.get_parameter(weights.name).detach().abs())
    block = model.get_submodule(ffn.name.removesuffix(".mlp"))
    torch.testing.assert_close(found[ffn.name], block.mlp.fc1.weight.detach().norm(dim=1))
    width = channels.shape[1]
    rows = block.attn.qkv.weight.detach().view(3, channels.shape[0], width, -1)
    torch.testing.assert_close(found[channels.name], rows.square().sum(dim=(0, 3)).sqrt())
    torch.testing.assert_close(found[heads.name], rows.square().sum(dim=(0, 2, 3)).sqrt())


def test_magnitude_of_a_residual_channel_is_the_norm_of_all_that_writes_to_it(vit: torch.nn.Module) -> None:
    found = score(vit, find_groups(vit, ["residual"]), "magnitude")["residual"]
    writers = [vit.patch_embed.proj.weight.flatten(1)]
    writers += [layer.weight for block in vit.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    torch.testing.assert_close(found, torch.cat(writers, dim=1).detach().norm(dim=1))


def test_random_depends_on_the_seed_alone(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    first, again, other = (score(vit, groups, "random", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    assert abs(float(torch.cat([s.flatten() for s in first.values()]).mean()) - 0.5) < 0.01


def loss_when_scaled(model: torch.nn.Module, group: Group, unit: int, by: float, batch: tuple) -> float:
    """Loss with everything that goes with a unit scaled by 1 + by."""
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
    return float(F.cross_entropy(answer(model, batch[0]), batch[1]))


@pytest.mark.parametrize("kind", ["weight", "ffn", "attention", "head", "residual"])
def test_taylor_is_the_squared_derivative_of_the_loss(vit: torch.nn.Module, kind: str) -> None:
    group = find_groups(vit, [kind])[-1]
    data, step = batches(vit), 1e-5
    found = score(vit, [group], "taylor", data)[group.name].flatten()
    for unit in range(0, group.units, max(1, group.units // 3)):
        slopes = [
            (loss_when_scaled(vit, group, unit, step, b) - loss_when_scaled(vit, group, unit, -step, b)) / (2 * step)
            for b in data
        ]
        assert float(found[unit]) == pytest.approx(sum(slope**2 for slope in slopes), rel=1e-4, abs=1e-18)


def test_taylor_needs_no_gradient_switched_on(vit: torch.nn.Module) -> None:
    groups, data = find_groups(vit, ["ffn"]), batches(vit)
    expected = score(vit, groups, "taylor", data)
    vit.requires_grad_(False)
    with torch.no_grad():
        found = score(vit, groups, "taylor", data)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for p in vit.parameters())


@pytest.mark.parametrize("criterion", ["taylor", "kl-literal"])
def test_dropout_takes_no_part_in_scoring(criterion: str) -> None:
    vit = tiny("thin")
    groups, data = find_groups(vit, ["head"]), batches(vit)
    for block in vit.blocks:
        block.mlp.drop1.p = 0.5
    expected = score(vit.eval(), groups, criterion, data)
    found = score(vit.train(), groups, criterion, data)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_kl_is_the_divergence_of_the_literal_removal(kind: str) -> None:
    vit = tiny("thin")
    group, data = find_groups(vit, [kind])[1], batches(vit)
    found = score(vit, [group], "kl-literal", data)[group.name]
    assert found.shape == group.shape
    inputs = torch.cat([b[0] for b in data])
    dense = literal_vit(vit, inputs, {})
    for unit in range(0, group.units, group.units // 4):
        keep = (torch.arange(group.units) != unit).view(group.shape)
        expected = kl(dense, literal_vit(vit, inputs, {group.name: keep}))
        assert float(found.flatten()[unit]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_kl_of_a_residual_channel_is_that_of_the_narrower_model() -> None:
    vit = tiny("thin")
    group, data = find_groups(vit, ["residual"])[0], batches(vit)
    found = score(vit, [group], "kl-literal", data)["residual"]
    inputs = torch.cat([b[0] for b in data])
    dense = literal_vit(vit, inputs, {})
    for unit in range(0, 48, 7):
        narrow = literal_vit(vit, inputs, {"residual": torch.arange(48) != unit})
        assert float(found[unit]) == pytest.approx(kl(dense, narrow), rel=1e-9)
        assert float(found[unit]) != pytest.approx(kl(narrow, dense), rel=1e-3)  # the other direction is not it


def test_kl_sums_over_images_however_they_are_batched(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["head"])
    data = [(images(vit, 4), torch.zeros(4).long())]
    apart = [(image[None], torch.zeros(1).long()) for image in data[0][0]]
    whole, single = score(vit, groups, "kl-literal", data), score(vit, groups, "kl-literal", apart)
    each = [score(vit, groups, "kl-literal", [batch]) for batch in apart]
    for name, found in whole.items():
        torch.testing.assert_close(found, single[name], rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(found, sum(one[name] for one in each), rtol=1e-10, atol=1e-15)
        assert bool((found > 0).all())


def test_kl_of_a_unit_that_does_nothing_is_zero() -> None:
    vit = tiny("thin")
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.weight[:, 11] = 0
    group = find_groups(vit, ["ffn"])[1]
    found = score(vit, [group], "kl-literal", batches(vit, 1))[group.name]
    assert (found == 0).nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_leaves_the_model_as_it_was(vit: torch.nn.Module, criterion: str, training: bool) -> None:
    vit.train(training)
    before = state(vit)
    kinds = {name: row.kinds[0] for name, row in METHODS.items()} | KINDS
    groups = find_groups(vit, [kinds.get(criterion, "ffn")])
    data = batches(vit)
    found = score(vit, groups, criterion, data)
    assert not any(images.requires_grad for images, _ in data)
    assert same_state(vit, before)
    assert all(p.grad is None and p.requires_grad for p in vit.parameters())
    assert all(module.training is training for module in vit.modules())
    assert [(n, tuple(s.shape), s.dtype) for n, s in found.items()] == [
        (g.name, g.shape, torch.float64) for g in groups
    ]
    assert not any(s.requires_grad for s in found.values())


def test_criteria_that_look_at_images_need_some(vit: torch.nn.Module) -> None:
    for criterion in ("taylor", "kl-literal"):
        with pytest.raises(BadInput, match=r"give batches$"):
            score(vit, find_groups(vit, ["ffn"]), criterion)


def test_an_unknown_criterion_is_refused_and_a_function_is_one(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    with pytest.raises(BadInput, match=r"^criterion 'best': unknown; use one of random, magnitude, energy"):
        score(vit, groups, "best")
    own, named = score(vit, groups, by_weights.magnitude), score(vit, groups, "magnitude")
    assert all(torch.equal(own[name], named[name]) for name in named)


def test_an_iterator_of_batches_is_refused_since_every_cycle_reads_them_again(vit):
    groups = find_groups(vit, ["ffn"])
    with pytest.raises(BadInput, match="used up after one pass"):
        score(vit, groups, "taylor", iter([(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))]))
