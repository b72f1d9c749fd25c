"""DIMAP on Swin-T/S/B: prunable weights, remaining weights and MACs against the paper."""

import functools

import pytest
import timm
import torch
from torch import nn

from vitprune import count, find_groups, score, zero
from vitprune.pruning.select import select

SHARES = (0.15, 0.35, 0.55)
MODELS = {  # prunable weights, parameters, non-zero millions at each share (24.406574 is printed as 24.406 there)
    "swin_tiny_patch4_window7_224": (25_878_528, 28_288_354, (24.407, 19.231, 14.055)),
    "swin_small_patch4_window7_224": (47_112_192, 49_606_258, (42.539, 33.117, 23.695)),
    "swin_base_patch4_window7_224": (83_755_008, 87_768_224, (75.205, 58.454, 41.703)),
}


@functools.cache
def swin_t() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1e-6  # so that later zeros come from masks
    return model


@pytest.mark.parametrize("name", MODELS)
def test_prunable_and_remaining_weights_equal_the_paper(name: str) -> None:
    prunable, total, remaining = MODELS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = find_groups(model, ["weight"])
    assert sum(g.units for g in groups) == prunable
    assert sum(p.numel() for p in model.parameters()) == total
    pools = {pool: sum(g.units for g in groups if g.layer_type == pool) for pool in ("qkv", "proj", "mlp")}
    assert [pools[pool] * 12 for pool in pools] == [3 * prunable, prunable, 8 * prunable]  # 1/4, 1/12, 2/3
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.shape, generator=generator) for g in groups}
    for share, expected in zip(SHARES, remaining, strict=True):
        masks = select(scores, share, "module", groups)
        removed = {p: sum(int((~masks[g.name]).sum()) for g in groups if g.layer_type == p) for p in pools}
        assert removed == {pool: int(share * units + 0.5) for pool, units in pools.items()}
        assert (total - sum(removed.values())) / 1e6 == pytest.approx(expected, abs=5e-4)


@functools.cache
def energies() -> dict[str, torch.Tensor]:
    return score(swin_t(), find_groups(swin_t(), ["weight"]), "energy")


@functools.cache
def energy_masks() -> list[dict[str, torch.Tensor]]:
    return [select(energies(), share, "module", find_groups(swin_t(), ["weight"])) for share in SHARES]


def lost(masks: dict[str, torch.Tensor], part: str) -> float:
    selected = [mask for name, mask in masks.items() if part in name]
    return sum(int((~mask).sum()) for mask in selected) / sum(mask.numel() for mask in selected)


def test_module_pools_remove_more_from_large_layers() -> None:
    """All layers have one distribution, so scores and thresholds are proportional to 1 / (size of the layer)."""
    masks = energy_masks()[2]
    assert [lost(masks, part) for part in (".qkv.", ".proj.", ".mlp.")] == pytest.approx([0.55] * 3, abs=1e-6)
    highest = {
        part: max(float(energies()[name][~mask].max()) for name, mask in masks.items() if part in name)
        for part in (".qkv.", ".proj.", ".mlp.")
    }
    assert highest[".proj."] / highest[".qkv."] == pytest.approx(3, rel=0.01)
    assert highest[".mlp."] / highest[".qkv."] == pytest.approx(0.75, rel=0.01)
    together = select(energies(), 0.55, "global")
    assert lost(together, "") == pytest.approx(0.55, abs=1e-6)
    assert [lost(together, part) for part in (".qkv.", ".proj.", ".mlp.")] == pytest.approx(
        [0.531, 0.347, 0.583], abs=1e-3
    )


def test_energy_of_all_of_swin_t_prunes_each_layer_by_magnitude() -> None:
    model, groups = swin_t(), find_groups(swin_t(), ["weight"])
    for share, masks in zip(SHARES, energy_masks(), strict=True):
        shares = {g.name: 1 - float(masks[g.name].float().mean()) for g in groups}
        for group in groups:
            weight, mask = model.get_parameter(group.name).detach().abs(), masks[group.name]
            assert float(weight[~mask].max()) <= float(weight[mask].min())
        # among layers of one distribution, larger ones are pruned more; each pool has the exact sparsity
        assert shares["layers.0.blocks.0.mlp.fc1.weight"] < share < shares["layers.3.blocks.0.mlp.fc1.weight"]
        assert {n for n in masks if ".attn.qkv." not in n and ".attn.proj." not in n and ".mlp.fc" not in n} == set()


def swin_t_macs() -> tuple[int, int]:
    """MACs of Swin-T for one 224 x 224 image, and of its qkv, proj, fc1 and fc2, layer by layer from its shape."""
    total = 56 * 56 * 96 * 48  # the patch embedding: 3 * 4 * 4 inputs to 96 channels
    prunable = 0
    for stage, depth in enumerate((2, 2, 6, 2)):
        tokens, width = (56 >> stage) ** 2, 96 << stage
        prunable += depth * tokens * 12 * width**2
        total += depth * tokens * 2 * 49 * width  # q @ k and attention @ v inside windows of 49 tokens
        if stage:
            total += tokens * 4 * (width // 2) * width  # merging: four neighbors of half the width to the new width
    return total + prunable + 768 * 1000, prunable


def test_macs_of_swin_t_zeroed_by_dimap() -> None:
    """The paper's nominal savings: 13.89, 32.41 and 50.93 % of the 4.494 G of the official counter.

    That counter adds norms and the average pooling; ours counts matrix products and convolutions only, 4.490 G, so
    the same saving of share * 4.162 G is a slightly larger part of it: 13.90, 32.44 and 50.98 %.
    """
    model, image = swin_t(), torch.zeros(1, 3, 224, 224)
    total, prunable = swin_t_macs()
    dense = count(model, image)
    assert (dense.macs, dense.nonzero_macs, dense.nominal_macs) == (total, total, total)
    assert round(prunable / 1e9, 3) == 4.162
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        for share, masks, printed in zip(SHARES, energy_masks(), (13.89, 32.41, 50.93), strict=True):
            zero(model, find_groups(model, ["weight"]), masks)
            result = count(model, image)
            assert total - result.nominal_macs == pytest.approx(share * prunable, abs=prunable / 25_878_528 * 2)
            assert 100 * (total - result.nominal_macs) / 4.494e9 == pytest.approx(printed, abs=0.006)
            assert (
                result.nonzero_macs > result.nominal_macs
            )  # small early layers keep more weights and process more tokens
            assert result.macs == total
            assert result.nonzero_params == MODELS["swin_tiny_patch4_window7_224"][1] - sum(
                int((~mask).sum()) for mask in masks.values()
            )
    finally:
        model.load_state_dict(kept, strict=False)
