"""Wrapped models are pruned, scored and saved as the model inside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEma
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vitprune
from tests.support.model_zoo import ZOO, batches, same_state, state, tiny
from vitprune import BadInput

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "sequential": nn.Sequential,
    "averaged": lambda model: AveragedModel(model),
    "twice": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


class Normalized(nn.Module):
    """A user-defined module that contains a timm model."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net((x - 0.5) / 0.5)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(("method", "kind"), [("magnitude", "weight"), ("channel-taylor", "ffn"), ("unit-obs", "ffn")])
def test_a_wrapped_model_gives_the_result_of_the_plain_one(vit: nn.Module, name: str, method: str, kind: str) -> None:
    options = {"sparsity": {kind: 0.5}, "calibration": batches(vit)}
    plain = vitprune.prune(vit, method, **options).model
    wrapped = vitprune.prune(WRAPPERS[name](vit), method, **options).model
    assert type(wrapped) is type(vit)
    assert same_state(wrapped, state(plain))


def test_targets_counts_and_checkpoints_of_a_compiled_model(tmp_path: Path) -> None:
    vit = tiny("vit", dtype=torch.float32)
    compiled, images = torch.compile(vit, backend="eager"), torch.zeros(1, 3, 32, 32)
    result = vitprune.prune(compiled, "channel-magnitude", target={"macs": 0.7})
    assert result.before == vitprune.count(vit, images) == vitprune.count(compiled, images)
    vitprune.save(compiled, tmp_path)
    assert same_state(vitprune.load(tmp_path), state(vit))
    assert vitprune.find_groups(compiled, ["ffn"])[0].name == "blocks.0.mlp"


def test_a_module_around_a_timm_model_is_pruned_with_it(vit: nn.Module) -> None:
    model = Normalized(vit)
    result = vitprune.prune(model, "channel-magnitude", sparsity={"ffn": 0.5}, example_input=torch.rand(1, 3, 32, 32))
    inner = vitprune.prune(vit, "channel-magnitude", sparsity={"ffn": 0.5})
    assert same_state(result.model.net, state(inner.model))


def test_a_state_dict_instead_of_a_model_is_refused(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^model: is a OrderedDict; give a model of timm.create_model"):
        vitprune.prune(vit.state_dict(), "magnitude", sparsity=0.5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_a_feature_extractor_keeps_its_stem_and_its_outputs(name: str) -> None:
    args = {"vit_tiny_patch16_224": ZOO["vit"][1], "swin_tiny_patch4_window7_224": ZOO["swin"][1]}.get(name, {})
    args = {key: value for key, value in args.items() if key != "num_classes"}
    args |= {"out_indices": (0, 1)} if name.startswith("vit") else {}
    model = timm.create_model(name, features_only=True, **args).eval()
    size = (1, 3, args.get("img_size", 64), args.get("img_size", 64))
    pruned = vitprune.prune(model, "magnitude", sparsity=0.5, example_input=torch.zeros(size)).model
    layers = {key: value for key, value in pruned.named_parameters() if value.dim() > 1 and "pos" not in key}
    stem = next(key for key in layers if key.endswith(("proj.weight", "conv1.weight")))
    assert bool(layers.pop(stem).all())
    weights = torch.cat([value.flatten() for value in layers.values()])
    assert 0.4 < float((weights == 0).float().mean()) < 0.6
    assert [part.shape for part in pruned(torch.zeros(size))] == [part.shape for part in model(torch.zeros(size))]
    with pytest.raises(BadInput, match=r"output"):
        vitprune.prune(model, "channel-magnitude", sparsity={"residual": 0.25})
    with pytest.raises(BadInput, match=r"only models made by timm.create_model|timm does not build"):
        vitprune.save(model, "unused")


def test_the_averaged_weights_of_an_old_class_of_timm_are_pruned(vit: nn.Module) -> None:
    result = vitprune.prune(ModelEma(vit), "magnitude", sparsity=0.5)
    assert type(result.model) is type(vit)
    assert result.sparsity == {"weight": 0.5}
