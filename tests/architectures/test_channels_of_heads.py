"""Channels of queries and keys, and of values and output, as kinds of their own: qk and vo."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import batches, images, predict, tiny
from vitprune import BadInput, PruneConfig, count, find_groups, load, merge_tokens, plan_for, prune, save, shrink, zero
from vitprune.architectures import structure
from vitprune.architectures.narrow_attention import TwoWidthAttention
from vitprune.groups import Group, Masks


def random_masks(groups: list[Group], kept: dict[str, int], seed: int = 0) -> Masks:
    """Keep some channels of every head, and all units of other kinds."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    for group in groups:
        order = torch.rand(group.shape, generator=generator).argsort(dim=-1)
        masks[group.name] = order < kept.get(group.kind, group.shape[-1])
    return masks


@pytest.mark.parametrize("name", ["vit", "odd", "extra"])
@pytest.mark.parametrize("kept", [{"qk": 3}, {"vo": 5}, {"qk": 3, "vo": 5}, {"qk": 6, "vo": 2}])
def test_cutting_equals_zeroing_and_models_are_saved(name: str, kept: dict[str, int], tmp_path: Path) -> None:
    model = tiny(name)
    groups = find_groups(model, list(kept))
    masks = random_masks(groups, kept)
    zeroed, cut = zero(copy.deepcopy(model), groups, masks), shrink(copy.deepcopy(model), groups, masks)
    x = images(model)
    torch.testing.assert_close(predict(cut, x), predict(zeroed, x), rtol=1e-9, atol=1e-9)
    assert {type(block.attn) for block in cut.blocks} == {TwoWidthAttention}
    save(cut.float(), tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(predict(loaded, x.float()), predict(cut, x.float()))
    assert structure(loaded) == structure(cut)


def test_slices_are_those_of_the_fused_layer(vit: nn.Module) -> None:
    qk, vo = (find_groups(vit, [kind])[0] for kind in ("qk", "vo"))
    width = vit.blocks[0].attn.proj.in_features
    assert (qk.name, vo.name) == ("blocks.0.attn.qk", "blocks.0.attn.vo")
    assert qk.shape == vo.shape == find_groups(vit, ["attention"])[0].shape
    assert {(part.param, part.axis, part.start, part.length) for part in qk.slices} == {
        ("blocks.0.attn.qkv.weight", 0, 0, 2),
        ("blocks.0.attn.qkv.bias", 0, 0, 2),
    }
    assert {(part.param, part.axis, part.start, part.length) for part in vo.slices} == {
        ("blocks.0.attn.qkv.weight", 0, 2 * width, 1),
        ("blocks.0.attn.qkv.bias", 0, 2 * width, 1),
        ("blocks.0.attn.proj.weight", 1, None, 1),
    }


def test_heads_and_widths_are_cut_one_after_another(vit: nn.Module, tmp_path: Path) -> None:
    model, x = copy.deepcopy(vit).float(), images(vit).float()
    for kind, kept in (("vo", 5), ("head", 1), ("qk", 4)):
        groups = find_groups(model, [kind])
        if kind == "head":
            masks = {group.name: torch.arange(group.units) < kept for group in groups}
        else:
            masks = random_masks(groups, {kind: kept})
        zeroed = zero(copy.deepcopy(model), groups, masks)
        model = shrink(model, groups, masks)
        torch.testing.assert_close(predict(model, x), predict(zeroed, x), rtol=1e-4, atol=1e-5)
    attention = model.blocks[0].attn
    assert (attention.num_heads, attention.qkv.out_features, attention.proj.in_features) == (1, 4 + 4 + 5, 5)
    save(model, tmp_path)
    assert torch.equal(predict(load(tmp_path), x), predict(model, x))


def test_attributes_are_found_where_a_model_has_two_widths() -> None:
    model = timm.create_model("mobilevit_xxs").eval()
    groups = find_groups(model, ["vo"])
    assert {group.owner for group in groups} == {group.owner for group in find_groups(model, ["qk"])}
    masks = random_masks(groups, {"vo": 7})
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    zeroed, cut = zero(copy.deepcopy(model), groups, masks), shrink(copy.deepcopy(model), groups, masks)
    torch.testing.assert_close(predict(cut, x), predict(zeroed, x), rtol=1e-4, atol=1e-4)


def test_other_attentions_are_refused_by_name() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    with pytest.raises(BadInput, match=r"^layers.0.blocks.0.attn \(WindowAttention\): its forward pass needs the old"):
        find_groups(model, ["qk"])
    normalized = timm.create_model("vit_tiny_patch16_224", depth=1, qk_norm=True)
    with pytest.raises(BadInput, match="a norm over the head couples its channels; this module cannot be pruned"):
        find_groups(normalized, ["qk"])
    assert [group.name for group in find_groups(normalized, ["vo"])] == ["blocks.0.attn.vo"]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["attention", "qk"], "prune.sparsity: qk and attention prune the same axis; choose one of them"),
        (["vo", "head"], "prune.sparsity: vo and head prune the same axis; choose one of them"),
    ],
)
def test_kinds_of_one_axis_are_refused(kinds: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=f"^{re.escape(message)}$"):
        plan_for(PruneConfig(method="unit-obs", kinds=kinds, sparsity=0.5))


def test_unit_obs_prunes_both_kinds_to_a_target(vit: nn.Module) -> None:
    model, seen, x = copy.deepcopy(vit).float(), batches(vit, 4, 16), images(vit, 4).float()
    seen = [(given.float(), labels) for given, labels in seen]
    result = prune(model, "unit-obs", target={"macs": 0.7}, kinds=["ffn", "qk", "vo"], calibration=seen)
    assert set(result.sparsity) == {"ffn", "qk", "vo"}
    assert count(result.model, x[:1]).macs / count(model, x[:1]).macs == pytest.approx(0.7, abs=0.02)
    assert predict(result.model, x).isfinite().all()


def test_merged_tokens_use_the_keys_of_two_widths(vit: nn.Module, tmp_path: Path) -> None:
    model, x = copy.deepcopy(vit).float(), images(vit).float()
    groups = find_groups(model, ["qk", "vo"])
    kept = {"qk": 3, "vo": 5}  # the first ones of every head, since tokens are compared by the mean key of the heads
    masks = {group.name: torch.arange(group.shape[1]).expand(group.shape) < kept[group.kind] for group in groups}
    merged = shrink(merge_tokens(copy.deepcopy(model), 2), groups, masks)
    zeroed = zero(merge_tokens(copy.deepcopy(model), 2), groups, masks)
    torch.testing.assert_close(predict(merged, x), predict(zeroed, x), rtol=1e-4, atol=1e-5)
    save(merged, tmp_path)
    assert torch.equal(predict(load(tmp_path), x), predict(merged, x))
