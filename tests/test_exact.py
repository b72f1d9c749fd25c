"""Exact scoring with cached prefixes, against the removal of one unit at a time."""

import copy

import pytest
import torch
from oracles import kl
from tiny_models import answer, images, tiny
from torch import Tensor, nn

from vitprune import find_groups
from vitprune.criteria import Setting
from vitprune.criteria.exact import divergences
from vitprune.families.chains import chain
from vitprune.groups import Group, shrink, zero

MODELS = ["vit", "thin", "distilled", "odd", "extra", "swin"]
KINDS = ["ffn", "attention", "head", "residual"]


def pairs() -> list[tuple[str, str]]:
    return [(name, kind) for name in MODELS for kind in KINDS if (name, kind) != ("swin", "residual")]


def one_by_one(model: nn.Module, group: Group, units: Tensor, inputs: Tensor) -> Tensor:
    """KL of every image for every unit: copy the model, remove the unit, run both."""
    found = torch.empty(len(units), len(inputs), dtype=torch.float64)
    for row, unit in enumerate(units):
        mask = (torch.arange(group.units) != unit).view(group.shape)
        remove = shrink if group.kind == "residual" else zero
        pruned = answer(remove(copy.deepcopy(model), [group], {group.name: mask}), inputs)
        found[row] = torch.tensor([kl(*both) for both in zip(answer(model, inputs), pruned, strict=True)])
    return found


def some(group: Group, number: int = 5) -> Tensor:
    return torch.randperm(group.units, generator=torch.Generator().manual_seed(3))[:number]


@pytest.mark.parametrize("name", [*MODELS, "deit"])
def test_a_chain_is_its_model_step_by_step(name: str) -> None:
    model = tiny(name)
    inputs, steps = images(model), chain(model)
    with torch.no_grad():
        torch.testing.assert_close(steps(inputs), answer(model, inputs), rtol=1e-12, atol=1e-12)
        stream = steps.embed(inputs)
        for step in steps.steps:
            stream = step(stream)
        torch.testing.assert_close(
            steps.finish(stream[:, : steps.reads]), answer(model, inputs), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_every_unit_of_every_image_diverges_as_when_it_is_removed(name: str, kind: str) -> None:
    model = tiny(name)
    groups, inputs = find_groups(model, [kind]), images(model)
    chosen = {group.name: some(group) for group in groups}
    found = divergences(model, groups, chosen, inputs, Setting())
    assert list(found) == [group.name for group in groups]
    for group in groups:
        expected = one_by_one(model, group, chosen[group.name], inputs)
        assert found[group.name].dtype == torch.float64
        assert bool((expected > 1e-11).all())
        torch.testing.assert_close(found[group.name], expected, rtol=1e-6, atol=1e-15)
