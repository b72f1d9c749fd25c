"""Fingerprints of models: equal for equal structures, different or missing for everything that could change a trace."""

import functools
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import PROVEN, SMALL, VIT, tiny
from vitprune import find_groups, prune, shrink
from vitprune.architectures.tracing.fingerprint import CAPACITY, StructureCache, fingerprint


def vit_with(**args: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **VIT | args)


@pytest.mark.parametrize("name", PROVEN)
def test_two_models_of_one_structure_have_one_fingerprint(name: str) -> None:
    one, other = (timm.create_model(name, **SMALL.get(name, {})) for _ in range(2))
    assert fingerprint(one) == fingerprint(other) is not None
    assert hash(fingerprint(one)) == hash(fingerprint(other))
    assert fingerprint(other.double()) == fingerprint(one)


def replaced_forward(model: nn.Module) -> None:
    block = model.blocks[0]
    forward = block.forward
    block.forward = lambda x, *more: forward(x)


def hooked(model: nn.Module) -> None:
    model.blocks[1].register_forward_hook(lambda module, given, output: output)


def unknown(model: nn.Module) -> None:
    model.blocks[0].mlp.table = object()


@pytest.mark.parametrize("change", [replaced_forward, hooked, unknown])
def test_models_that_a_fingerprint_cannot_describe_have_none(change: Callable[[nn.Module], None]) -> None:
    model = tiny("vit")
    change(model)
    assert fingerprint(model) is None


@pytest.mark.parametrize("change", [hooked, unknown])
def test_a_model_without_a_fingerprint_is_traced(change: Callable[[nn.Module], None]) -> None:
    model = tiny("vit")
    change(model)
    assert [group.units for group in find_groups(model, ["residual"])] == [48]


def tied(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def shared(model: nn.Module) -> None:
    model.blocks[1].mlp = model.blocks[0].mlp


def other_activation(model: nn.Module) -> None:
    model.blocks[0].mlp.act = nn.ReLU()


def other_partial(model: nn.Module) -> None:
    model.blocks[0].mlp.act_fn = functools.partial(nn.functional.gelu, approximate="tanh")


def other_heads(model: nn.Module) -> None:
    model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim = 1, 48


def narrower(model: nn.Module) -> None:
    (first, *_) = find_groups(model, ["ffn"])
    shrink(model, [first], {first.name: torch.arange(first.units) > 0})


@pytest.mark.parametrize("change", [tied, shared, other_activation, other_partial, other_heads, narrower])
def test_every_change_of_the_structure_changes_the_fingerprint(change: Callable[[nn.Module], None]) -> None:
    model = tiny("vit")
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) not in (before, None)


def test_a_value_is_computed_once_for_each_structure() -> None:
    cache: StructureCache[int] = StructureCache()
    computed = []

    def compute(model: nn.Module) -> int:
        computed.append(model)
        return len(computed)

    assert [cache.value_for(tiny("vit"), compute) for _ in range(3)] == [1, 1, 1]
    assert cache.value_for(prune(tiny("vit"), "channel-magnitude", sparsity={"ffn": 0.5}).model, compute) == 2
    for width in range(1, CAPACITY + 1):
        cache.value_for(nn.Linear(1, width), compute)
    assert len(cache) == CAPACITY
    assert cache.value_for(tiny("vit"), compute) == len(computed) == CAPACITY + 3  # the oldest was removed


def test_a_model_without_a_fingerprint_is_computed_again_when_its_shapes_change() -> None:
    cache: StructureCache[int] = StructureCache()
    model, computed = tiny("vit"), []
    unknown(model)

    def compute(model: nn.Module) -> int:
        computed.append(model)
        return len(computed)

    assert [cache.value_for(model, compute) for _ in range(2)] == [1, 1]
    model.head = nn.Linear(48, 3)
    assert [cache.value_for(model, compute) for _ in range(2)] == [2, 2]
