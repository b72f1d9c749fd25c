"""DeiT-Base pruned to UP-DeiT-S and UP-DeiT-T: the stock shapes of DeiT-S and DeiT-T, in plain timm."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import images, predict, same_state, state
from tests.support.plans import plan_for
from vitprune import save, score, shrink
from vitprune.config.params import load_params
from vitprune.config.prune_config import PruneConfig
from vitprune.pruning.cycle_masks import cycle_state, groups_for, select_masks

RECIPES = Path(__file__).parents[2] / "recipes"
STOCK = {"up_deit_small": ("deit_small_patch16_224", 22_050_664), "up_deit_tiny": ("deit_tiny_patch16_224", 5_717_416)}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """Return DeiT-Base with random weights; shared, so change only copies of its groups."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224")
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.empty(tensor.shape).uniform_(-0.05, 0.05, generator=generator) + float("norm" in name)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(drawn, assign=True)
    return model.eval()


@pytest.mark.parametrize("recipe", STOCK)
def test_up_deit_from_deit_base(base: nn.Module, recipe: str, tmp_path: Path) -> None:
    target, parameters = STOCK[recipe]
    pruned = cut(base, load_params(RECIPES / f"{recipe}.yaml").prune)
    assert sum(p.numel() for p in pruned.parameters()) == parameters
    x = images(pruned, 1)
    save(pruned, tmp_path)
    stock, by_directory = timm.create_model(target), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    stock.load_state_dict(pruned.state_dict(), strict=True)
    for again in (stock, by_directory):
        assert same_state(again, state(pruned))
        assert torch.equal(predict(again, x), predict(pruned, x))


def cut(base: nn.Module, settings: PruneConfig) -> nn.Module:
    """Return a new model, pruned as in a recipe by random scores."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224")
    model.load_state_dict(base.state_dict(), assign=True)
    shares = dict.fromkeys(settings.kinds, settings.sparsity)
    plan = plan_for(settings.method, shares, settings.scope, merge_heads_to=settings.merge_heads_to)
    groups = groups_for(model, plan)
    masks = select_masks(score(model, groups, "random"), plan, plan.targets()[0], cycle_state(model, plan))
    return shrink(model, groups, masks).eval()
