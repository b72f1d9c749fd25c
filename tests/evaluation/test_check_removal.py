"""check_removal fails for wrong slices; random masks; `vitprune check`."""

import sys
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import ZOO, redrawn
from tests.support.other_models import PixelNorm, PixelStream
from vitprune import BadInput, cli, find_groups
from vitprune.evaluation.check_model import check, make_test_model, random_odd_masks
from vitprune.evaluation.check_removal import check_removal

VIT = ("vit_tiny_patch16_224", ZOO["vit"][1])


def broken(kind: str, change) -> str:
    dense, inputs = make_test_model(*VIT)
    groups = find_groups(dense, [kind])
    masks = random_odd_masks(groups, 0.5)
    assert check_removal(dense, groups, masks, inputs).failures == ()
    return "; ".join(check_removal(dense, [change(group) for group in groups], masks, inputs).failures)


@pytest.mark.parametrize("missing", range(3))
def test_a_group_with_a_missing_slice_fails(missing: int) -> None:
    def without(group):
        return replace(group, slices=group.slices[:missing] + group.slices[missing + 1 :])

    assert "RuntimeError: " in broken("ffn", without)


def test_a_slice_with_the_wrong_units_fails() -> None:
    def reversed_heads(group):
        output, *rows = group.slices
        wrong = [replace(part, outer=1, inner=3 * part.inner) for part in rows]  # of the fused qkv
        return replace(group, slices=(output, *wrong))

    assert "logits differ by" in broken("head", reversed_heads)


def test_a_resize_that_does_not_record_the_structure_fails() -> None:
    def unrecorded(group):
        return replace(group, name=f"{group.name}.other")

    dense, inputs = make_test_model(*VIT)
    groups = [unrecorded(group) for group in find_groups(dense, ["attention"])]
    scaled = [replace(group, resize=lambda attn, shape: None) for group in groups]
    assert check_removal(dense, scaled, random_odd_masks(scaled, 0.5), inputs).failures


def test_units_without_effect_on_the_logits_fail_the_check() -> None:
    dense, inputs = make_test_model(*VIT)
    groups = find_groups(dense, ["ffn"])
    with torch.no_grad():
        for block in dense.blocks:
            block.mlp.fc2.weight.zero_()
    assert check_removal(dense, groups, random_odd_masks(groups, 0.5), inputs).failures == (
        "removing the units does not change the logits, so the check proves nothing",
    )


def test_random_odd_masks_keep_an_odd_number_of_units() -> None:
    dense, _ = make_test_model(*VIT)
    for kind in ("ffn", "attention", "head", "residual"):
        groups = find_groups(dense, [kind])
        for ratio in (0.01, 0.5, 0.99):
            masks = random_odd_masks(groups, ratio)
            assert all(bool((masks[group.name].sum(-1) % 2 == 1).all()) for group in groups)


def test_a_model_with_one_block_is_refused_for_block_removal() -> None:
    (row,) = check(VIT[0], ["block"], [0.5], VIT[1] | {"depth": 1})
    assert (row.verdict, row.why) == ("refused", "VisionTransformer: it has only one block, which cannot be removed")


def test_the_check_command_prints_verdicts_and_exits_with_1_on_failure(monkeypatch, capsys) -> None:
    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vitprune", "check", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    code, output = run("test_vit", "--kinds", "ffn,head", "--ratios", "0.5")
    assert (code, output.count("proven")) == (0, 2)
    size = make_test_model("test_vit")[1].shape[-1]
    assert f"MACs of {size} x {size} pixels" in " ".join(output.split())
    original = check_removal
    monkeypatch.setattr(
        "vitprune.evaluation.check_model.check_removal",
        lambda dense, groups, *rest: original(dense, [replace(g, slices=g.slices[:2]) for g in groups], *rest),
    )
    code, output = run("test_vit", "--kinds", "ffn", "--ratios", "0.5")
    assert (code, output.count("failed")) == (1, 1)
    assert run("test_vit", "--ratios", "half")[0] == 2


@pytest.mark.parametrize(
    ("kinds", "ratios", "why"),
    [(["fnn"], [0.5], "^--kinds 'fnn': unknown"), (["ffn"], [1.0], "^--ratios 1.0: must be above 0 and below 1")],
)
def test_unknown_kinds_and_ratios_are_refused(kinds, ratios, why) -> None:
    with pytest.raises(BadInput, match=why):
        list(check(*VIT[:1], kinds, ratios))


@pytest.mark.parametrize(("size", "expected"), [(32, (32, 32)), ((32, 64), (32, 64)), ([64, 32], (64, 32))])
def test_the_size_of_the_arguments_is_used(size: object, expected: tuple[int, int]) -> None:
    args = {"img_size": size, "depth": 1, "embed_dim": 16, "num_heads": 2}
    (result,) = check("vit_tiny_patch16_224", ["ffn"], [0.5], args)
    assert (result.verdict, result.image_size) == ("proven", expected)


def test_a_single_head_is_refused() -> None:
    (result,) = check("vit_tiny_patch16_224", ["head"], [0.5], {"depth": 2, "num_heads": 1, "embed_dim": 16})
    assert (result.verdict, result.why) == (
        "refused",
        "blocks.0.attn.heads: no group of kind 'head' has more than one unit, which cannot be removed",
    )


@pytest.mark.parametrize("norm", [timm.layers.LayerNorm2d, timm.layers.LayerNormAct2d, PixelNorm])
def test_the_reference_normalizes_the_channels_of_every_pixel(norm: type[nn.Module]) -> None:
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = redrawn(PixelStream(norm).double().eval(), 2)
    groups = find_groups(model, ["residual"], inputs)
    assert check_removal(model, groups, random_odd_masks(groups, 0.5), inputs).failures == ()
