"""Models that cannot be pruned as they are: refused in one line that names the layer and the remedy."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import vitprune
from tests.support.model_zoo import batches, tiny
from vitprune import BadInput, find_groups
from vitprune.criteria import ScoringContext
from vitprune.criteria.obs.gradients import weight_gradients
from vitprune.criteria.obs.weight_blocks import BlockRange


class LowRank(nn.Linear):
    """A Linear with a low-rank update, which is not part of its weight."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight + self.up @ self.down, self.bias)


class Adapter(nn.Module):
    """A low-rank update beside a Linear."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.lora_A = base, nn.Linear(base.in_features, 2)
        self.lora_B = nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


CHANGES = {
    "pruned by torch": (
        lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.3),
        r"^blocks.0.mlp.fc1.weight: is computed by L1Unstructured; call torch.nn.utils.prune.remove\(layer, 'weight'\)",
    ),
    "weight norm": (
        parametrizations.weight_norm,
        r"^blocks.0.mlp.fc1.weight: is parametrized; call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "spectral norm": (parametrizations.spectral_norm, r"^blocks.0.mlp.fc1.weight: is parametrized; call "),
    "old spectral norm": (
        nn.utils.spectral_norm,
        r"^blocks.0.mlp.fc1.weight: is computed by SpectralNorm; call torch.nn.utils.remove_spectral_norm",
    ),
    "two types": (lambda layer: layer.half(), r"^VisionTransformer: weights are torch.float16, torch.float64; give "),
    "no values": (lambda layer: layer.to("meta"), r"^blocks.0.mlp.fc1.weight: is on the meta device and has no values"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_cannot_be_pruned_is_named(vit: nn.Module, change: str) -> None:
    make, message = CHANGES[change]
    make(vit.blocks[0].mlp.fc1)
    for method in ("magnitude", "channel-magnitude", "obc"):
        with pytest.raises(BadInput, match=message):
            vitprune.prune(vit, method, sparsity=0.25, calibration=batches(tiny("vit")))
    with pytest.raises(BadInput, match=message):
        vitprune.save(vit, "unused")


def test_the_suggested_remedies_work(vit: nn.Module) -> None:
    fc1 = vit.blocks[0].mlp.fc1
    torch_prune.l1_unstructured(fc1, "weight", 0.3)
    torch_prune.remove(fc1, "weight")
    parametrizations.weight_norm(fc1)
    parametrize.remove_parametrizations(fc1, "weight")
    assert vitprune.prune(vit, "magnitude", sparsity=0.5).sparsity == {"weight": 0.5}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_low_rank_updates_are_refused(name: str, vit: nn.Module) -> None:
    vit.blocks[0].mlp.fc1 = LowRank(vit.blocks[0].mlp.fc1).double()
    with pytest.raises(BadInput, match=r"^blocks.0.mlp.fc1 \(LowRank\): expected a Linear or Conv2d layer that uses"):
        vitprune.prune(vit, "magnitude", sparsity=0.5)
    vit.blocks[0].mlp.fc1 = Adapter(nn.Linear(48, 192)).double()
    with pytest.raises(BadInput, match=r"^blocks.0.mlp.fc1: has a low-rank update \(lora_A\); merge it"):
        vitprune.prune(vit, "magnitude", sparsity=0.5)


class Branch(nn.Module):
    """A frozen Linear and a trainable low-rank update under names of one's own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_layer_with_a_low_rank_update_is_named_if_it_is_not_pruned(vit: nn.Module) -> None:
    assert not vitprune.prune(vit, "channel-magnitude", sparsity=0.5).skipped
    vit.blocks[0].mlp.fc1 = Branch(vit.blocks[0].mlp.fc1).double()
    vit.blocks[0].attn.proj = Branch(vit.blocks[0].attn.proj).double()
    result = vitprune.prune(vit, "channel-magnitude", sparsity=0.5)
    assert result.model.blocks[0].mlp.fc1.base.out_features == 192
    assert result.model.blocks[0].attn.proj.base.in_features == 24
    assert result.skipped == {
        "blocks.0.mlp.fc1": (
            "blocks.0.mlp.fc1: has a low-rank update (down, up) of base; merge it into the weight first"
        )
    }


def test_a_layer_that_blocks_share_is_pruned_once(vit: nn.Module) -> None:
    vit.blocks[1].mlp = vit.blocks[0].mlp
    names = [group.name for group in find_groups(vit, ["weight"])]
    assert [name for name in names if ".mlp." in name] == ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    for method in ("magnitude", "ovit"):
        result = vitprune.prune(vit, method, sparsity=0.5, calibration=batches(vit))
        assert result.model.blocks[0].mlp is result.model.blocks[1].mlp
        assert result.sparsity == {"weight": 0.5}
        zeros = sum(int((result.model.get_parameter(name) == 0).sum()) for name in names)
        assert zeros == sum(result.model.get_parameter(name).numel() for name in names) // 2
    with pytest.raises(BadInput, match=r"^blocks.0.mlp.fc1: runs more than once per forward pass; exclude it"):
        vitprune.prune(vit, "obc", sparsity=0.5, calibration=batches(vit))
    result = vitprune.prune(vit, "channel-taylor", sparsity={"ffn": 0.25}, calibration=batches(vit))
    assert result.model.blocks[0].mlp is result.model.blocks[1].mlp


def test_gradients_of_a_shared_layer_are_summed_over_its_calls(vit: nn.Module) -> None:
    vit.blocks[1].mlp = vit.blocks[0].mlp
    block = BlockRange("blocks.0.mlp.fc1.weight", 60, 0, 60)
    images, labels = batches(vit)[0]
    batch = (images[:1], labels[:1])
    [(_, gradients)] = weight_gradients(vit.double(), [block], [batch], ScoringContext())
    nn.functional.cross_entropy(vit(batch[0]), batch[1]).backward()
    torch.testing.assert_close(gradients[0], vit.blocks[0].mlp.fc1.weight.grad.flatten()[:60])


def test_single_weights_of_two_layers_with_one_parameter_are_refused(vit: nn.Module) -> None:
    vit.blocks[1].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
    with pytest.raises(BadInput, match=r"^blocks.1.mlp.fc1.weight: is the same parameter as blocks.0.mlp.fc1.weight"):
        vitprune.prune(vit, "magnitude", sparsity=0.5)
    vit.blocks[1].mlp = copy.deepcopy(vit.blocks[0].mlp)
    assert vitprune.prune(vit, "magnitude", sparsity=0.5).sparsity == {"weight": 0.5}
