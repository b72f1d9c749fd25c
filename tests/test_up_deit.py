"""DeiT-Base pruned to UP-DeiT-S and UP-DeiT-T: the stock shapes of DeiT-S and DeiT-T, in plain timm."""

from pathlib import Path

import pytest
import timm
import torch
from tiny_models import answer, images, same_state, state
from torch import nn

from vitprune import find_groups, plan_for, save, score, shrink
from vitprune.compress import choose
from vitprune.families import merge_heads

SHAPES = {  # share removed, merged heads, parameters
    "deit_small_patch16_224": (0.5, 6, 22_050_664),
    "deit_tiny_patch16_224": (0.75, 3, 5_717_416),
}
KINDS = ("residual", "attention", "ffn")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """DeiT-Base with random weights, drawn in one go; shared, so work on a copy's groups only."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224")
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.empty(tensor.shape).uniform_(-0.05, 0.05, generator=generator) + float("norm" in name)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(drawn, assign=True)
    return model.eval()


@pytest.mark.parametrize("target", SHAPES)
def test_deit_base_becomes_up_deit(base: nn.Module, target: str, tmp_path: Path) -> None:
    share, heads, parameters = SHAPES[target]
    pruned = cut(base, share, heads)
    assert sum(p.numel() for p in pruned.parameters()) == parameters
    x = images(pruned, 1)
    save(pruned, tmp_path)
    stock, by_directory = timm.create_model(target), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    stock.load_state_dict(pruned.state_dict(), strict=True)
    for again in (stock, by_directory):
        assert same_state(again, state(pruned))
        assert torch.equal(answer(again, x), answer(pruned, x))


def cut(base: nn.Module, share: float, heads: int) -> nn.Module:
    """Cut the model by random scores; a new model, the given one keeps its tensors."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224")
    model.load_state_dict(base.state_dict(), assign=True)
    plan = plan_for("upvits-literal", dict.fromkeys(KINDS, share), heads=heads)
    groups = merge_heads(model, find_groups(model, KINDS), heads)
    masks = choose(score(model, groups, "random"), groups, plan, plan.targets()[0])
    return shrink(model, groups, masks).eval()
