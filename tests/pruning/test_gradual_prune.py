"""Gradual pruning of models of other libraries in Python."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import vitprune
from tests.support.other_models import make_model
from vitprune import PruneConfig, TrainConfig

SHORT = TrainConfig(epochs=1, lr=1e-4)


def test_a_transformers_model_is_pruned_over_several_cycles() -> None:
    model = make_model("vit")
    images = torch.randn(6, 3, 64, 64)
    loader = [(images, torch.arange(6) % model.num_labels)]
    for method, settings in (("unit-obs", {"target": {"macs": 0.6}}), ("obc", {"sparsity": 0.5})):
        config = PruneConfig(method=method, cycles=2, finetune=TrainConfig(epochs=1, lr=0.001), **settings)
        result = vitprune.gradual_prune(model, config, loader, calibration=loader, teacher=model)
        assert type(result.model(images)) is type(model(images))
        assert not result.model._forward_hooks
        if method == "obc":
            assert all(not result.model.get_parameter(name)[~mask].any() for name, mask in result.masks.items())
        else:
            assert 0.58 < result.after.macs / result.before.macs <= 0.6
    assert all(parameter.requires_grad for parameter in model.parameters())


class OneSize(nn.Module):
    """A classifier of images of 32 x 32 pixels, with a layer that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.unused = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 4), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 4)."""
        assert images.shape[2:] == (32, 32)
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.mlp(tokens)).mean(dim=1))


@pytest.mark.parametrize("method", ["taylor", "channel-magnitude"])
def test_size_kinds_and_groups_are_those_of_prune(method: str) -> None:
    torch.manual_seed(0)
    model, batches = OneSize(), [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]
    config = PruneConfig(method=method, sparsity=0.5, cycles=2, finetune=SHORT)
    result = vitprune.gradual_prune(model, config, batches, calibration=batches if method == "taylor" else ())
    once = vitprune.prune(model, method, sparsity=0.5, calibration=batches)
    assert result.sparsity == once.sparsity
    assert result.skipped == once.skipped
    assert ("unused.weight" if method == "taylor" else "attention") in result.skipped


@pytest.mark.parametrize(("method", "kind"), [("obc", "weight"), ("unit-obs", "head")])
def test_attentions_of_torch_are_pruned_in_several_cycles(method: str, kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_classes=4, **sizes).eval()
    nn.init.normal_(model.heads.head.weight)
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]
    config = PruneConfig(method=method, sparsity=0.4, cycles=2, finetune=SHORT)
    result = vitprune.gradual_prune(model, config, batches, calibration=batches)
    assert result.sparsity[kind] > 0.2
