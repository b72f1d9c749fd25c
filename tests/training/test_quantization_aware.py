"""Quantization-aware training: the INT8 grid of the exported file, straight-through gradients, frozen zeros."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tests.support.model_zoo import batches, images, random_masks, state, tiny
from vitprune import find_groups
from vitprune.config.train_config import TrainConfig
from vitprune.training.distillation import classification, logit_distillation
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.quantization_aware import FakeQuant, fake_quantize_input, fake_quantize_weight


@pytest.fixture
def model() -> nn.Module:
    return tiny("vit", dtype=torch.float32)


def nearest(x: Tensor, scale: Tensor) -> Tensor:
    """Rounds to a grid explicitly, with a straight-through gradient."""
    return x + ((x / scale).round() * scale - x).detach()


class ByHand(nn.Module):
    """A linear layer or convolution that rounds its input and weight."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        scale = weight.detach().flatten(1).abs().amax(1) / 64
        rounded = nearest(weight, scale.view(-1, *[1] * (weight.dim() - 1)))
        x = nearest(x, (x.detach().max().clamp_min(0) - x.detach().min().clamp_max(0)) / 255)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, rounded, self.layer.bias)
        return F.conv2d(x, rounded, self.layer.bias, self.layer.stride)


def by_hand(model: nn.Module) -> nn.Module:
    """A copy whose layers round by hand."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ByHand(module))
    return model


def test_outputs_and_gradients_match_manual_rounding(model: nn.Module) -> None:
    other, (x, labels) = by_hand(model), batches(model, 1, 4)[0]
    with FakeQuant():
        F.cross_entropy(model(x.float()), labels).backward()
    F.cross_entropy(other(x.float()), labels).backward()
    mine = {name: p.grad for name, p in model.named_parameters()}
    theirs = {name.replace(".layer.", "."): p.grad for name, p in other.named_parameters()}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5)
    plain = copy.deepcopy(model)
    plain.zero_grad()
    F.cross_entropy(plain(x.float()), labels).backward()
    assert not torch.allclose(plain.head.weight.grad, mine["head.weight"], rtol=1e-3, atol=1e-5)


def test_layers_called_with_keyword_arguments_are_quantized() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with FakeQuant():
        result = F.linear(input=x, weight=layer.weight, bias=layer.bias)
        half = F.linear(x, weight=layer.weight)
    expected = F.linear(fake_quantize_input(x), fake_quantize_weight(layer.weight), layer.bias)
    assert torch.equal(result, expected)
    assert torch.equal(half, F.linear(fake_quantize_input(x), fake_quantize_weight(layer.weight)))
    assert not torch.equal(result, layer(x))


def test_frozen_layers_and_evaluation_are_not_quantized(model: nn.Module) -> None:
    x = images(model, 2).float()
    expected = model(x)
    with FakeQuant():
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)
        assert torch.equal(model.requires_grad_(False)(x), expected)


def test_the_grid_matches_the_exported_int8_file(model: nn.Module, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
    from vitprune.models.export import export_onnx
    from vitprune.models.int8 import quantize_int8

    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[3] = 0
    export_onnx(model, tmp_path / "model.onnx", images(model, 2).float())
    quantize_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", images(model, 16).float())
    file = onnx.load(tmp_path / "int8.onnx").graph.initializer
    result = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in file}
    weights = [fake_quantize_weight(p.detach()) for p in model.parameters() if p.dim() > 1]
    names = [name for name, tensor in result.items() if name.endswith("_quantized") and tensor.dim() > 1]
    assert len(names) == 2 * 4 + 2  # two blocks, patch embedding and head
    for name in names:
        points, scale = result[name].float(), result[name.replace("_quantized", "_scale")]
        as_given = name.endswith("weight_quantized")  # MatMul stores it transposed
        grid = points * scale.view(-1, *[1] * (points.dim() - 1)) if as_given else (points * scale).T
        assert any(grid.shape == w.shape and torch.allclose(w, grid, rtol=0, atol=1e-7) for w in weights), name


def test_the_grid_size_and_that_zero_is_exact() -> None:
    x = torch.rand(64, 500, generator=torch.Generator().manual_seed(0)) * 3 + 1
    assert len(fake_quantize_weight(x - 2.5)[0].unique()) <= 129
    assert 180 < len(fake_quantize_input(x).unique()) <= 256
    assert torch.equal(fake_quantize_input(x * 0), x * 0)
    assert torch.equal(fake_quantize_weight(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert float((fake_quantize_input(x) - x).abs().max()) <= 4 / 255 / 2 * 1.001
    assert torch.equal(fake_quantize_input(torch.cat([x, x * 0])) == 0, torch.cat([x, x * 0]) == 0)


def test_training_with_fake_quantization_keeps_zeros(model: nn.Module) -> None:
    teacher, groups = copy.deepcopy(model), find_groups(model, ["weight"])
    other, masks = copy.deepcopy(model), random_masks(groups, 0)
    noise = [(x.float(), labels) for x, labels in batches(model, 2, 4)]
    for one, int8 in ((model, True), (other, False)):
        recipe = TrainConfig(epochs=2, lr=0.01, int8=int8, ema=0.5)
        task = logit_distillation(one, copy.deepcopy(teacher), 1.0, 1.0, 0.0)
        train(task, lambda epoch: noise, 2, recipe, 0, lambda row: None, FrozenZeros(groups, masks))
        for group in groups:
            assert not one.get_parameter(group.name)[~masks[group.name].view_as(one.get_parameter(group.name))].any()
    assert any(not torch.equal(value, state(other)[name]) for name, value in state(model).items())
    x = images(model, 2).float()
    assert torch.equal(model(x), model(x))  # quantization is off again
    with FakeQuant():
        assert not torch.equal(model(x), other(x))


@pytest.mark.parametrize("key", ["compile", "checkpointing"])
def test_int8_is_refused_with_compile_and_checkpointing(key: str) -> None:
    with pytest.raises(ValidationError, match=f"int8 cannot be combined with {key}; set one of them to false"):
        TrainConfig.model_validate({"epochs": 1, "lr": 0.1, "int8": True, key: True})


def test_the_loss_decreases_with_fake_quantization(model: nn.Module) -> None:
    (noise,) = batches(model, 1, 8)
    rows: list[dict[str, float]] = []
    recipe = TrainConfig(epochs=12, lr=0.01, int8=True)
    train(classification(model), lambda epoch: [(noise[0].float(), noise[1])], 1, recipe, 0, rows.append)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
