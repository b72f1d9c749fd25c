"""Random, magnitude and energy scores: values by hand, LAMP, and float precision."""

import pytest
import torch

from tests.support.model_zoo import tiny
from tests.support.reference_kl import lamp, naive_masks
from vitprune import BadInput, find_groups, score
from vitprune.groups import Group, ParamSlice
from vitprune.pruning.select import select


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
    assert energy_of([0.0, 2.0, 0.0, 2.0]) == [0.0, 0.5, 0.0, 1.0]  # of equal weights, the first is removed first
    assert energy_of([1e-200]) == [0.0]  # its square is zero in float64


def test_energy_is_lamp(vit: torch.nn.Module) -> None:
    for group in find_groups(vit, ["weight"]):
        result = score(vit, [group], "energy")[group.name]
        torch.testing.assert_close(result, lamp(vit.get_parameter(group.name).detach()), rtol=1e-12, atol=0)


def test_energy_invariants(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    with torch.no_grad():
        vit.get_parameter(groups[0].name)[:, :7] = 0
    before = score(vit, groups, "energy")
    for group in groups:
        weight = vit.get_parameter(group.name).detach().abs().flatten()
        selected = before[group.name].flatten()
        assert float(selected.max()) == 1.0
        assert torch.equal(selected == 0, weight == 0)
        assert bool((selected[weight.argsort(stable=True)].diff() >= 0).all())
    masks = select(before, 0.4, "global")
    with torch.no_grad():
        for power, group in enumerate(groups):
            vit.get_parameter(group.name).mul_((-1) ** power * 2.0**power)
    assert all(torch.equal(mask, masks[n]) for n, mask in select(score(vit, groups, "energy"), 0.4).items())


def test_energy_keeps_its_precision_in_float32() -> None:
    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    model = OneLayer([0.0])
    model.w = torch.nn.Parameter(weight)
    result = score(model, [Group("w", "weight", (200_000,), (ParamSlice("w", None),))], "energy")["w"]
    order = weight.abs().argsort(stable=True).flip(0)
    squares = weight.double().square()[order]
    torch.testing.assert_close(result[order], squares / squares.cumsum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_energy_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    coarse = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(8).round().div(8)  # many ties, and zeros
    values = torch.cat([coarse, torch.tensor([-0.0, 2.0**-24, -(2.0**-24)])]).to(dtype)
    model = OneLayer([0.0])
    model.w = torch.nn.Parameter(values)
    result = score(model, [Group("w", "weight", (len(values),), (ParamSlice("w", None),))], "energy")["w"]
    largest_first = sorted(range(len(values)), key=lambda at: (abs(float(values[at])), at), reverse=True)
    total = 0.0
    for at in largest_first:
        total += float(values[at]) ** 2
        assert float(result[at]) == pytest.approx(float(values[at]) ** 2 / total, rel=1e-12)


def test_global_energy_masks_equal_global_lamp_masks(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    scores = {g.name: lamp(vit.get_parameter(g.name).detach()) for g in groups}
    units = sum(g.units for g in groups)
    expected = naive_masks(scores, round(0.45 * units))
    masks = select(score(vit, groups, "energy"), 0.45, "global")
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_energy_of_units_is_refused(vit: torch.nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: the energy score is for single weights"):
        score(vit, find_groups(vit, ["ffn"]), "energy")


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_magnitude_is_the_norm_of_the_rows_that_produce_a_unit(name: str) -> None:
    model = tiny(name)
    weights, ffn, heads, channels = (find_groups(model, [kind])[0] for kind in ("weight", "ffn", "head", "attention"))
    result = score(model, [weights, ffn, heads, channels], "magnitude")
    torch.testing.assert_close(result[weights.name], model.get_parameter(weights.name).detach().abs())
    block = model.get_submodule(ffn.name.removesuffix(".mlp"))
    torch.testing.assert_close(result[ffn.name], block.mlp.fc1.weight.detach().norm(dim=1))
    width = channels.shape[1]
    rows = block.attn.qkv.weight.detach().view(3, channels.shape[0], width, -1)
    torch.testing.assert_close(result[channels.name], rows.square().sum(dim=(0, 3)).sqrt())
    torch.testing.assert_close(result[heads.name], rows.square().sum(dim=(0, 2, 3)).sqrt())


def test_magnitude_of_a_residual_channel_is_the_norm_of_its_producer_rows(vit: torch.nn.Module) -> None:
    result = score(vit, find_groups(vit, ["residual"]), "magnitude")["residual"]
    writers = [vit.patch_embed.proj.weight.flatten(1)]
    writers += [layer.weight for block in vit.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    torch.testing.assert_close(result, torch.cat(writers, dim=1).detach().norm(dim=1))


def test_random_depends_on_the_seed_alone(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    first, again, other = (score(vit, groups, "random", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    assert abs(float(torch.cat([s.flatten() for s in first.values()]).mean()) - 0.5) < 0.01
