"""timm's interfaces on pruned models: features, intermediates, classifiers, checkpointing, optimizer groups."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet, FeatureListNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from tests.support.model_zoo import images, predict
from tests.support.pruned_models import CASES, CUTS, FAMILIES, cut_of, dense_of, masks_of
from vitprune import find_groups, load, prune, save, shrink, zero

EVERY = pytest.mark.parametrize(("family", "cut"), CASES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the pruned model of a case, saved and loaded."""
    parent = tmp_path_factory.mktemp("cut")

    @cache
    def once(family: str, cut: str) -> nn.Module:
        save(cut_of(family, cut), parent / f"{family}-{cut}")
        return load(parent / f"{family}-{cut}")

    return lambda family, cut: copy.deepcopy(once(family, cut))


@pytest.fixture
def model(loaded: Any, family: str, cut: str) -> Any:
    return loaded(family, cut)


def widths(model: Any) -> list[int]:
    """Return the channels of the stream after every block or stage, from the shapes of the weights."""
    if hasattr(model, "stages"):
        return [len(stage.norm.weight) for stage in model.stages]
    if hasattr(model, "layers"):
        return [len(stage.blocks[-1].norm2.weight) for stage in model.layers]
    return [len(block.norm2.weight) for block in model.blocks]


def spatial(model: Any, features: Tensor) -> Tensor:
    """Features before the head as a map (B, C, H, W)."""
    if features.dim() == 4:
        return features.permute(0, 3, 1, 2) if hasattr(model, "layers") else features
    side = int((features.shape[1] - model.num_prefix_tokens) ** 0.5)
    return features[:, model.num_prefix_tokens :].unflatten(1, (side, side)).permute(0, 3, 1, 2)


@EVERY
@torch.no_grad()
def test_features_and_head(model: Any) -> None:
    x = images(model)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (3, widths(model)[-1])
    assert model.num_features == model.head_hidden_size == widths(model)[-1]
    assert spatial(model, features).shape[1] == widths(model)[-1]


@EVERY
@torch.no_grad()
def test_intermediates(model: Any) -> None:
    x, wide = images(model), widths(model)
    final, result = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert [part.shape[1] for part in result] == wide
    torch.testing.assert_close(result[-1], spatial(model, final))
    for indices, positions in ((1, [-1]), ([0, -1], [0, -1]), (2, [-2, -1])):
        some = model.forward_intermediates(x, indices=indices, intermediates_only=True, output_fmt="NCHW")
        assert [part.shape[1] for part in some] == [wide[index] for index in positions]
    if hasattr(model, "blocks"):  # the others return maps only
        tokens = model.forward_intermediates(x, indices=[0], intermediates_only=True, output_fmt="NLC")[0]
        plain = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert torch.equal(tokens, plain.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", ["units", "heads"])
@torch.no_grad()
def test_intermediates_equal_those_of_the_zeroed_dense_model(family: str, cut: str) -> None:
    zeroed, small = dense_of(family).double(), dense_of(family).double()
    for kind in CUTS[cut]:
        groups = find_groups(zeroed, [kind])
        zero(zeroed, groups, masks_of(groups))
        shrink(small, find_groups(small, [kind]), masks_of(groups))
    x = images(zeroed)
    for one, two in zip(zeroed.forward_intermediates(x)[1], small.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@EVERY
@torch.no_grad()
def test_feature_wrappers_report_the_new_channels(family: str, cut: str, loaded: Any) -> None:
    given = loaded(family, cut)
    x, wide, last = images(given), widths(given), len(widths(given)) - 1
    expected = given.forward_intermediates(x, indices=[0, last], intermediates_only=True)
    getter = FeatureGetterNet(loaded(family, cut), out_indices=(0, last), norm=False)
    assert getter.feature_info.channels() == [wide[0], wide[last]]
    assert all(torch.equal(*pair) for pair in zip(getter(x), expected, strict=True))
    layers = FeatureListNet(loaded(family, cut), out_indices=(0, last), flatten_sequential=True)
    assert layers.feature_info.channels() == [wide[0], wide[last]]
    for selected, channels in zip(layers(x), layers.feature_info.channels(), strict=True):
        assert channels in (selected.shape[1], selected.shape[-1])


@EVERY
def test_reset_classifier_works_and_is_saved(model: Any, tmp_path: Path) -> None:
    x, wide = images(model), widths(model)[-1]
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert (head.in_features, head.out_features) == (wide, 7)
    model.reset_classifier(5)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.num_classes == 5
    assert predict(model, x).shape == (3, 5)
    assert torch.equal(predict(again, x), predict(model, x))
    model.reset_classifier(0)
    assert predict(model, x).shape == (3, wide)


@EVERY
def test_gradient_checkpointing_gives_equal_gradients(family: str, cut: str, loaded: Any) -> None:
    result = []
    for on in (False, True):
        model: Any = loaded(family, cut).train()
        model.set_grad_checkpointing(on)
        torch.manual_seed(0)  # stochastic depth, which is Swin's default
        outputs = model(images(model))
        (outputs if isinstance(outputs, Tensor) else outputs[0]).square().sum().backward()
        result.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*result, strict=True))


@EVERY
def test_parameters_are_grouped_and_named_for_optimizers(model: Any, family: str) -> None:
    names = {name for name, _ in model.named_parameters()}
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(name for layer in layers.values() for name in layer) == sorted(names)
    dense: Any = dense_of(family)
    assert set(model.no_weight_decay()) & names == set(dense.no_weight_decay()) & names
    layered = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(part["params"]) for part in layered.param_groups) == len(names)


@EVERY
@torch.no_grad()
def test_pruned_intermediate_layers(model: Any, tmp_path: Path) -> None:
    x, wide = images(model), widths(model)
    expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    assert list(model.prune_intermediate_layers([0], prune_norm=True, prune_head=True)) == [0]
    torch.testing.assert_close(spatial(model, model.forward_features(x)), expected)
    assert widths(model) == wide[:1]


@pytest.mark.parametrize("family", ["vit", "distilled", "deit3", "pvt"])
def test_timm_loads_a_uniform_checkpoint_without_vitprune(family: str, tmp_path: Path) -> None:
    pruned = prune(
        dense_of(family), "channel-magnitude", sparsity={"ffn": 0.25, "attention": 0.5, "residual": 0.5}
    ).model
    save(pruned, tmp_path)
    wrapped = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    assert wrapped.feature_info.channels() == widths(pruned)[:2]
    with torch.no_grad():
        x, result = images(pruned), wrapped(images(pruned))
        expected: list[Tensor] = pruned.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for one, two in zip(result, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm resizes Swin's tables
@pytest.mark.parametrize("family", ["vit", "distilled", "deit3", "registers", "swin"])
def test_another_image_size(family: str, tmp_path: Path) -> None:
    model: Any = cut_of(family, "stream")
    model.set_input_size(img_size=64)
    x = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    save(model, tmp_path)
    assert torch.equal(predict(load(tmp_path), x), predict(model, x))


def test_every_case_has_fewer_parameters() -> None:
    for family, cut in CASES:
        model: nn.Module = cut_of(family, cut)
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense_of(family).parameters())
