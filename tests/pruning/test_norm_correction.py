"""Correction of norms and biases towards the dense model's logits."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.support.model_zoo import batches, redrawn, tiny
from tests.support.other_models import PixelNorm, PixelStream
from tests.support.plans import context, plan_for
from vitprune import BadInput, find_groups, prune
from vitprune.architectures.stream_rotation import rotate_stream
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.pruning import norm_correction as module
from vitprune.pruning.norm_correction import correct_norms, dense_logits
from vitprune.pruning.prune_cycles import prune_cycles


def disturbed(name: str) -> tuple[nn.Module, nn.Module]:
    """Return a model, and a copy with other norms and biases."""
    model = tiny(name)
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in other.named_parameters():
        if "norm" in key or key.endswith("bias"):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, other


def slow_system(model: nn.Module, names: list[str], expected: list[Tensor], images: list[Tensor], seed: int) -> Tensor:
    """Gradients by one backward pass per image and direction, of complete parameters."""
    rows, first = [], 0
    for batch, aim in zip(images, expected, strict=True):
        for index in range(len(batch)):
            values = {name: model.get_parameter(name).detach().requires_grad_() for name in names}
            logits = functional_call(model, values, (batch[index : index + 1],))
            directions = fisher_directions(
                aim[index : index + 1].softmax(-1), None, module.DIRECTIONS, seed, range(first, first + 1)
            )
            for direction in directions:
                slopes = torch.autograd.grad((logits * direction).sum(), list(values.values()), retain_graph=True)
                rows.append(torch.cat([slope.flatten() for slope in slopes]))
            first += 1
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["vit", "swin", "pvt", "extra", "rotated"])
def test_gradients_equal_those_of_single_images_and_parameters(name: str) -> None:
    model, other = disturbed("vit" if name == "rotated" else name)
    if name == "rotated":  # into a model with RmsNorms
        other = rotate_stream(other, torch.eye(48))
    given = batches(model)
    target = dense_logits(model, given)
    layers = module._layers(other, given[0][0][:1])
    names = [key for layer in layers for key in layer.names]
    slopes, _ = module._system(other, layers, target, given, DEFAULT_CONTEXT)
    expected = slow_system(other, names, target, [images for images, _ in given], 0)
    torch.testing.assert_close(slopes, expected, rtol=1e-8, atol=1e-12)
    alone, _ = module._system(other, layers, target, given, context(memory=1))
    torch.testing.assert_close(alone, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [32, 40])  # as many columns as channels, and more
@pytest.mark.parametrize("norm", [timm.layers.LayerNorm2d, PixelNorm, timm.layers.LayerNormAct2d])
def test_norms_over_channels_of_pixels_are_corrected_along_their_channels(norm: type[nn.Module], size: int) -> None:
    model = redrawn(PixelStream(norm).double().eval(), 2)
    model.unused = nn.Linear(3, 4)
    generator = torch.Generator().manual_seed(1)
    given = [(torch.randn(3, 3, size, 32, dtype=torch.float64, generator=generator), torch.zeros(3)) for _ in range(2)]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0][1].weight *= 1.3
    target = dense_logits(model, given)
    layers = module._layers(other, given[0][0][:1])
    names = [key for layer in layers for key in layer.names]
    with_activation = norm is timm.layers.LayerNormAct2d
    assert ("blocks.0.0.weight" in names) != with_activation
    assert "unused.bias" not in names
    slopes, _ = module._system(other, layers, target, given, DEFAULT_CONTEXT)
    expected = slow_system(other, names, target, [images for images, _ in given], 0)
    torch.testing.assert_close(slopes, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_a_correction_reduces_the_kl_on_held_out_images(name: str) -> None:
    model, other = disturbed(name)
    given = batches(model, 4, 8)
    before = copy.deepcopy(other.state_dict())
    result = correct_norms(other, dense_logits(model, given), given, DEFAULT_CONTEXT)
    assert result.facts["nats_after"] < 0.9 * result.facts["nats_before"]
    assert result.values
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key])


def test_no_correction_without_an_error() -> None:
    model = tiny("vit")
    result = correct_norms(model, dense_logits(model, batches(model)), batches(model), DEFAULT_CONTEXT)
    assert result.values == {}
    assert result.facts["nats_before"] == pytest.approx(0, abs=1e-12)


def test_memory_limits_the_number_of_images() -> None:
    model, other = disturbed("vit")
    given = batches(model, 2, 8)
    width = sum(
        other.get_parameter(name).numel() for layer in module._layers(other, given[0][0][:1]) for name in layer.names
    )
    few = correct_norms(other, dense_logits(model, given), given, context(memory=width * 8 * module.DIRECTIONS * 8))
    thinner = [(images[::2], labels[::2]) for images, labels in given]
    same = correct_norms(other, dense_logits(model, thinner), thinner, DEFAULT_CONTEXT)
    assert few.facts == pytest.approx(same.facts)
    images, labels = (torch.cat(parts) for parts in zip(*given, strict=True))
    for sizes in ([1] * 16, [3, 5, 1, 7]):  # of the batches
        split = list(zip(images.split(sizes), labels.split(sizes), strict=True))
        few = correct_norms(other, dense_logits(model, split), split, context(memory=width * 8 * module.DIRECTIONS * 8))
        assert few.facts == pytest.approx(same.facts)


def test_a_plan_with_correction_records_it_and_has_a_lower_kl() -> None:
    dense = tiny("vit")
    given = batches(dense, 4, 8)
    distance = {}
    for expected in (False, True):
        model = copy.deepcopy(dense)
        (cycle,) = prune_cycles(model, plan_for("unit-obs", 0.4, correct_norms=expected), given)
        pairs = zip(dense_logits(dense, given), dense_logits(model, given), strict=True)
        distance[expected] = sum(
            float((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()) for a, b in pairs
        )
        assert bool(cycle.corrected) == expected
    assert cycle.corrected["nats_after"] <= cycle.corrected["nats_before"]
    assert distance[True] < distance[False]
    assert find_groups(model, ["ffn"])[0].units < find_groups(dense, ["ffn"])[0].units


def test_a_correction_needs_images() -> None:
    with pytest.raises(BadInput, match=r"^prune.correct_norms: needs images"):
        list(prune_cycles(tiny("vit"), plan_for("channel-magnitude", 0.4, correct_norms=True), []))


def test_one_image_cannot_judge_a_correction(vit: nn.Module) -> None:
    one, two = batches(vit, 1, 1), batches(vit, 1, 2)
    with pytest.raises(BadInput, match=r"^prune.correct_norms: 1 calibration image; give at least 2, "):
        prune(vit, "channel-magnitude", sparsity=0.4, calibration=one, correct_norms=True)
    assert prune(vit, "channel-magnitude", sparsity=0.4, calibration=two, correct_norms=True).correction
    # little memory leaves two images, one for each half
    few = correct_norms(vit, dense_logits(tiny("vit", 1), batches(vit, 1, 8)), batches(vit, 1, 8), context(memory=1))
    ends = [(images[::7], labels[::7]) for images, labels in batches(vit, 1, 8)]
    same = correct_norms(vit, dense_logits(tiny("vit", 1), ends), ends, DEFAULT_CONTEXT)
    assert few.facts == pytest.approx(same.facts)


def test_a_model_without_biases_and_norms_is_refused() -> None:
    layers = [nn.Conv2d(3, 8, 8, 8, bias=False), nn.Flatten(), nn.Linear(128, 16, bias=False)]
    model = nn.Sequential(*layers, nn.GELU(), nn.Linear(16, 4, bias=False))
    given = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    with pytest.raises(BadInput, match=r"^prune.correct_norms: Sequential has no scale of a norm and no bias that"):
        prune(model, "magnitude", sparsity=0.4, calibration=given, correct_norms=True)


def test_the_result_says_whether_the_correction_helped() -> None:
    model = tiny("vit")
    given = batches(model, 4, 8)
    result = prune(model, "unit-obs", sparsity=0.6, calibration=given, correct_norms=True)
    before, after = (f"{result.correction[key]:.3g}" for key in ("nats_before", "nats_after"))
    assert before != after
    assert f"correction: held-out KL divergence {before} -> {after} nats per image\n" in str(result)
    result = prune(model, "unit-obs", sparsity=0, calibration=given, correct_norms=True)  # nothing to correct
    assert result.correction["nats_before"] == result.correction["nats_after"]
    assert "correction" not in str(prune(model, "unit-obs", sparsity=0.4, calibration=given))
