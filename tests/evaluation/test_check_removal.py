"""Proofs that fail where a rule is wrong, what they are drawn from, and the command that prints them."""

import sys
from dataclasses import replace

import pytest
import torch

from tests.support.model_zoo import ZOO
from vitprune import BadInput, cli, find_groups
from vitprune.evaluation.check_model import check, make_test_model, random_odd_masks
from vitprune.evaluation.check_removal import check_removal

VIT = ("vit_tiny_patch16_224", ZOO["vit"][1])


def broken(kind: str, change) -> str:
    dense, inputs = make_test_model(*VIT)
    groups = find_groups(dense, [kind])
    masks = random_odd_masks(groups, 0.5)
    assert check_removal(dense, groups, masks, inputs).faults == ()
    return "; ".join(check_removal(dense, [change(group) for group in groups], masks, inputs).faults)


@pytest.mark.parametrize("gone", range(3))
def test_a_group_without_one_of_its_slices_fails(gone: int) -> None:
    def without(group):
        return replace(group, slices=group.slices[:gone] + group.slices[gone + 1 :])

    assert "RuntimeError: " in broken("ffn", without)


def test_a_slice_of_other_units_fails() -> None:
    def reversed_heads(group):
        rows, *others = group.slices
        return replace(group, slices=(replace(rows, outer=1, inner=3 * rows.inner), *others))

    assert "its logits differ by" in broken("head", reversed_heads)


def test_a_cut_that_nobody_records_fails() -> None:
    def unrecorded(group):
        return replace(group, name=f"{group.name}.other")

    dense, inputs = make_test_model(*VIT)
    groups = [unrecorded(group) for group in find_groups(dense, ["attention"])]
    scaled = [replace(group, resize=lambda attn, shape: None) for group in groups]
    assert check_removal(dense, scaled, random_odd_masks(scaled, 0.5), inputs).faults


def test_removing_what_does_nothing_proves_nothing() -> None:
    dense, inputs = make_test_model(*VIT)
    groups = find_groups(dense, ["ffn"])
    with torch.no_grad():
        for block in dense.blocks:
            block.mlp.fc2.weight.zero_()
    assert check_removal(dense, groups, random_odd_masks(groups, 0.5), inputs).faults == (
        "removing its units changes nothing, so nothing is proven",
    )


def test_masks_leave_an_odd_number_of_units_and_never_none() -> None:
    dense, _ = make_test_model(*VIT)
    for kind in ("ffn", "attention", "head", "residual"):
        groups = find_groups(dense, [kind])
        for ratio in (0.01, 0.5, 0.99):
            masks = random_odd_masks(groups, ratio)
            assert all(bool((masks[group.name].sum(-1) % 2 == 1).all()) for group in groups)


def test_the_only_block_of_a_model_is_no_failure() -> None:
    (row,) = check(VIT[0], ["block"], [0.5], VIT[1] | {"depth": 1})
    assert (row.verdict, row.why) == ("refused", "VisionTransformer: it has one block, which stays")


def test_the_command_prints_proofs_and_ends_with_1_where_one_fails(monkeypatch, capsys) -> None:
    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vitprune", "check", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    code, told = run("test_vit", "--kinds", "ffn,head", "--ratios", "0.5")
    assert (code, told.count("proven")) == (0, 2)
    right = check_removal
    monkeypatch.setattr(
        "vitprune.evaluation.check_model.prove",
        lambda dense, groups, *rest: right(dense, [replace(g, slices=g.slices[:2]) for g in groups], *rest),
    )
    code, told = run("test_vit", "--kinds", "ffn", "--ratios", "0.5")
    assert (code, told.count("failed")) == (1, 1)
    assert run("test_vit", "--ratios", "half")[0] == 2


@pytest.mark.parametrize(
    ("kinds", "ratios", "why"),
    [(["fnn"], [0.5], "^--kinds 'fnn': unknown"), (["ffn"], [1.0], "^--ratios 1.0: must be above 0 and below 1")],
)
def test_what_cannot_be_proven_is_refused(kinds, ratios, why) -> None:
    with pytest.raises(BadInput, match=why):
        list(check(*VIT[:1], kinds, ratios))
