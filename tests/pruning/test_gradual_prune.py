"""Gradual pruning of models of other libraries in Python."""

import torch

import vitprune
from tests.support.other_models import make_model
from vitprune import PruneConfig, TrainConfig


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
