"""Zeroing and shrinking units give the same function, and invalid masks are refused."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.support.model_zoo import ZOO, images, predict, random_masks, same_state, state, tiny
from tests.support.reference_kl import LiveNorm, literal_vit
from vitprune import BadInput, find_groups, permute, shrink, zero
from vitprune.config.prune_config import KINDS, Kind
from vitprune.groups import ParamSlice, positions, resize_group, unit_sums

CLOSE = {"rtol": 0, "atol": 1e-12}
VITS = [name for name in ZOO if not name.startswith(("swin", "pvt"))]


def test_kinds_equal_those_of_params_yaml() -> None:
    assert get_args(Kind) == KINDS


def fused(model: torch.nn.Module, on: bool) -> torch.nn.Module:
    for module in model.modules():
        if "fused_attn" in vars(module):
            module.fused_attn = on
    return model


@pytest.mark.parametrize("on", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("kind", ["ffn", "head", "attention"])
@pytest.mark.parametrize("name", ZOO)
def test_zero_and_shrink_give_the_same_logits(name: str, kind: str, on: bool) -> None:
    zeroed, shrunk = fused(tiny(name), on), fused(tiny(name), on)
    groups = find_groups(zeroed, [kind])
    masks = random_masks(groups, 1 if kind == "head" else 0.4)
    x = images(zeroed)
    dense = predict(zeroed, x)
    zero(zeroed, groups, masks)
    shrink(shrunk, groups, masks)
    assert sum(p.numel() for p in shrunk.parameters()) < sum(p.numel() for p in zeroed.parameters())
    torch.testing.assert_close(predict(shrunk, x), predict(zeroed, x), **CLOSE)
    assert (predict(zeroed, x) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", ZOO)
def test_fused_and_plain_attention_agree_on_a_shrunk_model(name: str) -> None:
    model = tiny(name)
    groups = find_groups(model, ["attention"])
    shrink(model, groups, random_masks(groups, 0.4))
    x = images(model)
    torch.testing.assert_close(predict(fused(model, True), x), predict(fused(model, False), x), **CLOSE)


def test_kinds_shrunk_together_equal_kinds_shrunk_in_turn(vit: torch.nn.Module) -> None:
    together, in_turn = tiny("vit"), tiny("vit")
    kinds = ["residual", "attention", "ffn"]
    groups = find_groups(vit, kinds)
    masks = random_masks(groups, 0.3)
    shrink(together, groups, masks)
    for group in reversed(groups):
        shrink(in_turn, [next(g for g in find_groups(in_turn, [group.kind]) if g.name == group.name)], masks)
    assert same_state(in_turn, state(together))
    x = images(vit)
    torch.testing.assert_close(predict(together, x), literal_vit(vit, x, masks), **CLOSE)


@pytest.mark.parametrize("kinds", [["residual"], ["attention"], ["ffn"], ["residual", "attention", "ffn"]])
@pytest.mark.parametrize("removed", [1, 0.3])
def test_shrink_equals_literal_removal(vit: torch.nn.Module, kinds: list[str], removed: float) -> None:
    groups = find_groups(vit, kinds)
    masks = random_masks(groups, removed)
    x = images(vit)
    expected = literal_vit(vit, x, masks)
    shrink(vit, groups, masks)
    torch.testing.assert_close(predict(vit, x), expected, **CLOSE)


def test_reference_without_masks_equals_the_model(vit: torch.nn.Module) -> None:
    x = images(vit)
    torch.testing.assert_close(predict(vit, x), literal_vit(vit, x, {}), **CLOSE)


@pytest.mark.parametrize("name", VITS)
def test_layer_norm_uses_only_the_kept_residual_channels(name: str) -> None:
    masked, shrunk = tiny(name), tiny(name)
    groups = find_groups(shrunk, ["residual"])
    masks = random_masks(groups, 0.3)
    for path, module in list(masked.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            masked.set_submodule(path, LiveNorm(module, masks["residual"]))
    shrink(shrunk, groups, masks)
    x = images(masked)
    torch.testing.assert_close(predict(shrunk, x), predict(masked, x), **CLOSE)
    assert shrunk.embed_dim == shrunk.num_features == int(masks["residual"].sum())


def test_zeroing_residual_channels_is_refused(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["residual"])
    masks = random_masks(groups, 1)
    x = images(vit)
    removed = literal_vit(vit, x, masks)
    before = state(vit)
    with pytest.raises(BadInput, match=r"^residual: residual channels cannot be zeroed.*shrink them$"):
        zero(vit, groups, masks)
    assert same_state(vit, before)
    with torch.no_grad():
        for part in groups[0].slices:
            vit.get_parameter(part.param).index_fill_(part.axis, positions(part, ~masks["residual"]), 0)
    assert (predict(vit, x) - removed).abs().max() > 1e-3


def test_zero_accepts_a_residual_mask_that_keeps_all_channels(vit: torch.nn.Module) -> None:
    before = state(vit)
    zero(vit, find_groups(vit, ["residual"]), {"residual": torch.ones(48, dtype=torch.bool)})
    assert same_state(vit, before)


def test_biases_are_removed_with_their_units(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])[:1]
    masks = {"blocks.0.mlp": torch.arange(192) != 5}
    dense = state(vit)
    zero(vit, groups, masks)
    now = vit.state_dict()
    assert now["blocks.0.mlp.fc1.bias"].nonzero().flatten().tolist() == [i for i in range(192) if i != 5]
    assert torch.equal(now["blocks.0.mlp.fc2.bias"], dense["blocks.0.mlp.fc2.bias"])
    assert not now["blocks.0.mlp.fc2.weight"][:, 5].any()
    assert not now["blocks.0.mlp.fc1.weight"][5].any()
    changed = [name for name in now if not torch.equal(now[name], dense[name])]
    assert changed == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight"]


def test_an_attention_channel_is_a_row_of_q_k_and_v(vit: torch.nn.Module) -> None:
    # head 2, channel 3 of 16 is channel 35 of 48: rows 35, 83, 131 of qkv, column 35 of proj
    groups = find_groups(vit, ["attention"])[1:]
    keep = torch.ones(3, 16, dtype=torch.bool)
    keep[2, 3] = False
    zero(vit, groups, {"blocks.1.attn": keep})
    rows = vit.blocks[1].attn.qkv.weight.abs().sum(1)
    assert (rows == 0).nonzero().flatten().tolist() == [35, 83, 131]
    assert (vit.blocks[1].attn.qkv.bias == 0).nonzero().flatten().tolist() == [35, 83, 131]
    assert (vit.blocks[1].attn.proj.weight.abs().sum(0) == 0).nonzero().flatten().tolist() == [35]


def test_positions_by_hand() -> None:
    removed = torch.tensor([False, True, False])
    assert positions(ParamSlice("p", 0), removed).tolist() == [1]
    assert positions(ParamSlice("p", 0, outer=3), removed).tolist() == [1, 4, 7]
    assert positions(ParamSlice("p", 0, inner=2), removed).tolist() == [2, 3]
    assert positions(ParamSlice("p", 0, outer=2, inner=2), removed).tolist() == [2, 3, 8, 9]
    # two heads of two channels, q and k of each side by side: q00 q01 k00 k01 q10 q11 k10 k11
    removed = torch.tensor([False, True, True, False])
    assert positions(ParamSlice("p", 0, heads=2, runs=2), removed).tolist() == [1, 3, 4, 6]


@torch.no_grad()
def test_unit_sums_by_hand(vit: torch.nn.Module) -> None:
    group = find_groups(vit, ["head"])[0]
    values = {name: p.detach() for name, p in vit.named_parameters()}
    attn = vit.blocks[0].attn
    expected = [
        sum(
            float(attn.qkv.weight[part * 48 + c].sum() + attn.qkv.bias[part * 48 + c])
            for part in range(3)
            for c in selected
        )
        + sum(float(attn.proj.weight[:, c].sum()) for c in selected)
        for selected in (range(16), range(16, 32), range(32, 48))
    ]
    assert unit_sums(group, values).tolist() == pytest.approx(expected, abs=1e-12)


def uneven(vit: torch.nn.Module) -> tuple[list, dict[str, torch.Tensor]]:
    groups = find_groups(vit, ["ffn", "attention"])
    masks = random_masks(groups, 0.3)
    masks["blocks.1.attn"][0, :] = True
    return groups, masks


def test_uneven_heads_are_refused_and_nothing_is_shrunk(vit: torch.nn.Module) -> None:
    before = state(vit)
    groups, masks = uneven(vit)
    with pytest.raises(BadInput, match=r"^blocks.1.attn: heads would keep \[16, 11, 11\] channels"):
        shrink(vit, groups, masks)
    assert same_state(vit, before)


def test_uneven_heads_may_be_zeroed(vit: torch.nn.Module) -> None:
    groups, masks = uneven(vit)
    x = images(vit)
    expected = literal_vit(vit, x, masks)
    torch.testing.assert_close(predict(zero(vit, groups, masks), x), expected, **CLOSE)


@pytest.mark.parametrize("apply", [zero, shrink])
@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (
            torch.ones(191, dtype=torch.bool),
            r"^blocks.1.mlp: mask is torch.bool \[191\], needed is .* \[192\]$",
        ),
        (torch.ones(192), r"^blocks.1.mlp: mask is torch.float32 \[192\]"),
        (None, r"^blocks.1.mlp: no mask for this group"),
    ],
    ids=["size", "type", "none"],
)
def test_a_mask_that_does_not_fit_is_refused_and_nothing_changes(vit, apply, mask, why) -> None:
    before = state(vit)
    masks = random_masks(groups := find_groups(vit, ["ffn"]), 0.5) | {"blocks.1.mlp": mask}
    if mask is None:
        del masks["blocks.1.mlp"]
    with pytest.raises(BadInput, match=why):
        apply(vit, groups, masks)
    assert same_state(vit, before)


def test_masks_without_a_smaller_form_are_refused(vit: torch.nn.Module) -> None:
    before = state(vit)
    weights, units = find_groups(vit, ["weight"]), find_groups(vit, ["ffn"])
    with pytest.raises(BadInput, match=r"^blocks.0.attn.qkv.weight: single weights cannot be cut"):
        shrink(vit, units + weights, random_masks(units + weights, 0.5))
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: all 192 units would be removed"):
        shrink(vit, units, random_masks(units, 192))
    both = find_groups(vit, ["attention", "head"])
    with pytest.raises(BadInput, match=r"blocks.0.attn and blocks.0.attn.heads cut the same axis"):
        shrink(vit, both, random_masks(both, 1))
    assert same_state(vit, before)


def test_groups_that_are_out_of_date_are_refused(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    masks = random_masks(groups, 0.5)
    shrink(vit, groups, masks)
    before = state(vit)
    for apply in (zero, shrink):
        with pytest.raises(BadInput, match=r"^blocks.0.mlp.fc1.bias: axis 0 is 96 long, the group is out of date"):
            apply(vit, groups, masks)
    assert same_state(vit, before)


@pytest.mark.parametrize("apply", [zero, shrink, permute])
@pytest.mark.parametrize(
    ("name", "kind", "other", "missing"),
    [
        ("swin", "ffn", "vit", "layers.0.blocks.0.mlp.fc1.bias"),
        ("vit", "attention", "extra", "blocks.0.attn.qkv.bias"),
    ],
)
def test_groups_of_another_model_are_refused(apply, name: str, kind: str, other: str, missing: str) -> None:
    groups, model = find_groups(tiny(name), [kind]), tiny(other)
    orders = {group.name: torch.arange(group.units) for group in groups}
    before = state(model)
    with pytest.raises(
        BadInput, match=rf": the model has no {missing}, it is another model's group; call find_groups$"
    ):
        apply(model, groups, orders if apply is permute else random_masks(groups, 0.5))
    assert same_state(model, before)


@pytest.mark.parametrize(
    ("kind", "order", "why"),
    [
        ("weight", torch.arange(6912), "units of kind weight have no other order; leave its order out"),
        ("block", torch.arange(4), "units of kind block have no other order; leave its order out"),
        (
            "ffn",
            torch.arange(192.0),
            "its order is not a permutation of 192 units within their heads; give the integers",
        ),
        ("ffn", torch.arange(192).clamp(min=1), "its order is not a permutation of 192 units"),
        ("ffn", torch.ones(192, dtype=torch.bool), "its order is not a permutation of 192 units"),
        ("attention", torch.arange(47), "its order is not a permutation of 48 units"),
        ("attention", torch.arange(48).flip(0), "its order is not a permutation of 48 units within their heads"),
    ],
)
def test_orders_that_are_no_permutation_are_refused(vit: torch.nn.Module, kind: str, order, why: str) -> None:
    groups, before = find_groups(vit, [kind]), state(vit)
    with pytest.raises(BadInput, match=f"^{groups[-1].name}: {why}"):
        permute(vit, groups, {groups[-1].name: order})
    assert same_state(vit, before)


def test_orders_of_any_integer_type_are_accepted(vit: torch.nn.Module) -> None:
    group, x = find_groups(vit, ["ffn"])[0], images(vit)
    expected, weight = predict(vit, x), vit.get_parameter(group.slices[0].param).detach().clone()
    permute(vit, [group], {group.name: torch.arange(191, -1, -1, dtype=torch.int16)})
    assert torch.equal(vit.get_parameter(group.slices[0].param), weight.flip(0))
    torch.testing.assert_close(predict(vit, x), expected, **CLOSE)


@pytest.mark.parametrize("apply", [zero, shrink])
def test_masks_in_place_of_groups_are_refused(vit: torch.nn.Module, apply) -> None:
    groups = find_groups(vit, ["ffn"])
    masks = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    with pytest.raises(BadInput, match=r"^groups: is a dict; give a list of groups of find_groups$"):
        apply(vit, masks, groups)


def test_nothing_is_shrunk_if_one_group_is_out_of_date(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    shrink(vit, groups[1:], random_masks(groups[1:], 0.5))
    before = state(vit)
    with pytest.raises(BadInput, match="out of date"):
        shrink(vit, groups, random_masks(groups, 0.5))
    assert same_state(vit, before)


def test_resize_group_refuses_a_larger_shape(vit: torch.nn.Module) -> None:
    group = find_groups(vit, ["ffn"])[0]
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: shape \[193\] does not fit into \[192\]"):
        resize_group(vit, group, (193,))
    with pytest.raises(BadInput, match="does not fit"):
        resize_group(vit, replace(group, shape=(192,)), (2, 96))


def test_recorded_layer_sizes_are_updated_and_gradients_flow(vit: torch.nn.Module) -> None:
    vit.blocks[0].mlp.fc1.weight.requires_grad_(False)
    groups = find_groups(vit, ["residual", "attention", "ffn"])
    shrink(vit, groups, random_masks(groups, 0.25))
    for module in vit.modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        if isinstance(module, torch.nn.LayerNorm):
            assert module.normalized_shape == (36,)
    assert not vit.blocks[0].mlp.fc1.weight.requires_grad
    vit(images(vit)).sum().backward()
    assert all(p.grad is not None for p in vit.parameters() if p.requires_grad)


def test_zero_removes_single_weights_only(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    masks = random_masks(groups, 0.5)
    dense = state(vit)
    zero(vit, groups, masks)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, dense[name] * masks[name] if name in masks else dense[name])
