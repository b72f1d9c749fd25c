"""Parameters, MACs, accuracy and latency, compared with values computed by hand."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import images, random_masks, same_state, state, tiny
from vitprune import BadInput, count, find_groups, prune, shrink, zero
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import group_costs
from vitprune.evaluation.latency import environment, latency

# stock DeiT, at 224 x 224, attention products counted
DEIT = {"tiny": (5_717_416, 1.254), "small": (22_050_664, 4.599), "base": (86_567_656, 17.564)}


def macs_of_vit(tokens: int, width: int, depth: int, inner: int, hidden: int, pixels: int, classes: int) -> int:
    """Patch embedding, then per block qkv, q @ k, attention @ v, proj, fc1, fc2, then the head on one token."""
    block = tokens * width * 3 * inner + 2 * tokens**2 * inner + tokens * inner * width + 2 * tokens * width * hidden
    return (tokens - 1) * pixels * width + depth * block + width * classes


@pytest.mark.parametrize("size", DEIT)
def test_counts_of_deit(size: str) -> None:
    params, giga = DEIT[size]
    with torch.device("meta"):  # counting MACs needs shapes only; meta tensors have no zeros
        model = timm.create_model(f"deit_{size}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == params
    width = model.embed_dim
    assert macs_of_vit(197, width, 12, width, 4 * width, 768, 1000) / 1e9 == pytest.approx(giga, abs=5e-4)


def test_counts_of_deit_tiny() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("deit_tiny_patch16_224")
    result = count(model, torch.zeros(2, 3, 224, 224))  # counts of one image for any batch size
    assert result.params == 5_717_416
    assert result.macs == macs_of_vit(197, 192, 12, 192, 768, 768, 1000) == 1_253_683_200
    assert round(result.macs / 1e9, 3) == 1.254


@pytest.mark.real
def test_counts_of_the_real_deit_tiny(real_deit: nn.Module) -> None:
    result = count(real_deit, torch.zeros(1, 3, 224, 224))
    assert (result.params, result.macs) == (5_717_416, 1_253_683_200)
    assert result.nonzero_params == 5_717_255  # 161 values of its norms are exactly zero
    assert result.nonzero_macs == result.nominal_macs == result.macs


def test_counts_of_a_shrunk_model_by_hand(vit: nn.Module) -> None:
    dense = count(vit, images(vit))
    assert dense.macs == macs_of_vit(17, 48, 2, 48, 192, 192, 7)
    pruned = prune(vit, "channel-magnitude", sparsity={"ffn": 0.5, "attention": 0.25, "residual": 0.25}).model
    result = count(pruned, images(vit))
    assert result.macs == macs_of_vit(17, 36, 2, 36, 96, 192, 7) == result.nonzero_macs == result.nominal_macs
    assert result.params == sum(p.numel() for p in pruned.parameters()) == result.nonzero_params < dense.params


def test_fused_attention_does_not_change_the_count(vit: nn.Module) -> None:
    result = []
    for on in (True, False):
        for block in vit.blocks:
            block.attn.fused_attn = on
        result.append(count(vit, images(vit)))
        assert all(block.attn.fused_attn is on for block in vit.blocks)
    assert result[0] == result[1]


def test_macs_of_zeroed_weights_by_hand(vit: nn.Module) -> None:
    # 17 tokens; zeros: 1000 of qkv in block 0, 100 of fc2 in block 1; prunable 55,296 weights, each used 17 times
    dense = count(vit, images(vit))
    with torch.no_grad():
        vit.blocks[0].attn.qkv.weight.view(-1)[:1000] = 0
        vit.blocks[1].mlp.fc2.weight.view(-1)[:100] = 0
    result = count(vit, images(vit))
    assert result.macs == dense.macs
    assert dense.nonzero_macs - result.nonzero_macs == 1100 * 17
    assert dense.nominal_macs - result.nominal_macs == 1100 * 17  # equal: every layer runs over 17 tokens
    assert result.nonzero_params == dense.nonzero_params - 1100 == result.params - 1100


def test_nominal_and_nonzero_macs_differ_if_token_counts_differ(swin: nn.Module) -> None:
    # a block of stage 0 has a quarter of the weights of one of stage 1, and runs over 64 tokens instead of 16
    dense = count(swin, images(swin))
    with torch.no_grad():
        swin.layers[0].blocks[0].mlp.fc1.weight.zero_()  # 96 x 24 = 2304 of 69,120 prunable weights
    result = count(swin, images(swin))
    prunable = 2 * (12 * 24**2) * 64 + 2 * (12 * 48**2) * 16
    assert dense.nonzero_macs - result.nonzero_macs == 2304 * 64
    assert dense.nominal_macs - result.nominal_macs == round(prunable * 2304 / 69_120)
    assert dense.nominal_macs - result.nominal_macs < 2304 * 64


def test_zeros_outside_prunable_layers_affect_only_their_own_layer(vit: nn.Module) -> None:
    dense = count(vit, images(vit))
    with torch.no_grad():
        vit.patch_embed.proj.weight[:, 0] = 0  # 48 * 64 of its weights, each used for 16 patches
    result = count(vit, images(vit))
    assert dense.nonzero_macs - result.nonzero_macs == 48 * 64 * 16
    assert result.nominal_macs == dense.nominal_macs


def test_zeroed_and_shrunk_units_have_equal_cost_except_attention_products(vit: nn.Module) -> None:
    zeroed, cut = tiny("vit"), tiny("vit")
    groups = find_groups(vit, ["ffn"])
    masks = random_masks(groups, 0.5)
    after = count(zero(zeroed, groups, masks), images(vit)), count(shrink(cut, groups, masks), images(vit))
    assert after[0].nonzero_macs == after[1].macs
    assert after[0].nonzero_params == after[1].params


def test_counting_does_not_change_the_model(vit: nn.Module) -> None:
    before = state(vit)
    for training in (True, False):
        count(vit.train(training), images(vit))
        assert vit.training is training
    assert same_state(vit, before)
    assert all(not module._forward_hooks for module in vit.modules())
    assert all(p.grad is None for p in vit.parameters())


def test_counts_of_a_model_without_groups() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some seeds draw an exact zero
        model = timm.create_model("regnetx_002", num_classes=3)
    result = count(model, torch.zeros(1, 3, 32, 32))
    assert result.nominal_macs == result.macs > 0
    assert result.params == sum(p.numel() for p in model.parameters())


def test_group_costs_by_hand(vit: nn.Module) -> None:
    groups = find_groups(vit, ["ffn", "head", "weight"])
    result = group_costs(vit, groups, images(vit))
    assert result["blocks.0.mlp"] == (192 * 48 + 192 + 48 * 192, 17 * 2 * 192 * 48)
    assert result["blocks.0.attn.heads"] == (144 * 48 + 144 + 48 * 48, 17 * 4 * 48 * 48)
    assert result["blocks.1.mlp.fc2.weight"] == (192 * 48, 17 * 192 * 48)


class Echo(nn.Module):
    """Returns its input, so that tests can write the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_accuracy_by_hand() -> None:
    logits = torch.eye(7)[[0, 1, 2, 3]] + torch.linspace(0, 0.5, 7)  # best: 0, 1, 2, 3; then 6, 5, 4, ...
    labels = torch.tensor([0, 1, 6, 0])  # right, right, second, last
    top, best = accuracy(Echo(), [(logits[:3], labels[:3]), (logits[3:], labels[3:])])
    assert top == {"top1": 50.0, "top5": 75.0}
    assert best.tolist() == [0, 1, 2, 3]
    assert accuracy(Echo(), [(logits[:, :3], torch.tensor([0, 1, 2, 0]))])[0] == {"top1": 75.0, "top5": 100.0}
    with pytest.raises(BadInput, match=r"^batches: no images; give at least one batch$"):
        accuracy(Echo(), [])


def test_latency_alternates_models_and_returns_percentiles(vit: nn.Module, swin: nn.Module) -> None:
    result = latency([vit, vit], images(vit, 2), runs=5)
    assert [(row["runs"], row["batch"]) for row in result] == [(5, 2), (5, 2)]
    assert all(0 < row["p10"] <= row["median"] <= row["p90"] for row in result)
    assert latency([swin], images(swin), runs=1)[0]["p10"] > 0


def test_latency_takes_models_of_different_types_and_keeps_their_modes(vit: nn.Module) -> None:
    models = [vit, copy.deepcopy(vit).bfloat16().train(), copy.deepcopy(vit).float()]
    models[2].blocks[0].train()
    modes = [[module.training for module in model.modules()] for model in models]
    assert len(latency([*models, models[0]], images(vit, 2), runs=1)) == 4
    assert [[module.training for module in model.modules()] for model in models] == modes


def test_environment_names_versions_and_device() -> None:
    facts = environment(torch.device("cpu"))
    assert (facts["torch"], facts["timm"], facts["device"]) == (torch.__version__, timm.__version__, "cpu")
    assert facts["cores"] >= 1
