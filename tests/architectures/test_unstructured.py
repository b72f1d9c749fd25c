"""Tables of prunable layers: which weights are pruned, their number, and save and load of a pruned model."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import predict, redrawn, same_state, state
from vitprune import BadInput, count, find_groups, load, prune, save
from vitprune.architectures import uniform_args
from vitprune.pruning.select import select

# Weights of the prunable layers, by arithmetic on the published shapes: 12 * 12 * 192^2 for DeiT-Tiny, and so on.
COUNTS = {
    "deit_tiny_patch16_224": (48, 5_308_416),
    "deit_small_patch16_224": (48, 21_233_664),
    "deit_base_patch16_224": (48, 84_934_656),
    # 12 blocks of 12 * 192^2, two class-attention blocks of the same: 3 + 1 + 8 squares each
    "xcit_tiny_12_p16_224": (12 * 4 + 2 * 6, 14 * 12 * 192**2),
    # widths 96 to 768: 8 squares per block (3, 3, 9, 3), three 2 x 2 convolutions between
    "convnext_tiny": (
        2 * 18 + 3,
        8 * (3 * 96**2 + 3 * 192**2 + 9 * 384**2 + 3 * 768**2) + 4 * (96 * 192 + 192 * 384 + 384 * 768),
    ),
    # all convolutions but the first, 32 x 3 x 3 x 3, of 25,576,264 parameters; fc has 2,049,000, norms 53,120 + 2 * 64
    "resnet50d": (48 + 4 + 2, 25_576_264 - 2_049_000 - 864 - (53_120 + 2 * 64)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_prunable_weights(name: str) -> None:
    with torch.device("meta"):
        groups = find_groups(timm.create_model(name), ["weight"])
    assert (len(groups), sum(group.units for group in groups)) == COUNTS[name]


LAYERS = {
    "xcit_nano_12_p16_224": {
        "blocks.0.attn.qkv": "qkv",
        "blocks.0.attn.proj": "proj",
        "blocks.0.mlp.fc1": "mlp",
        "blocks.0.mlp.fc2": "mlp",
        "cls_attn_blocks.1.attn.q": "qkv",
        "cls_attn_blocks.1.attn.k": "qkv",
        "cls_attn_blocks.1.attn.v": "qkv",
        "cls_attn_blocks.1.norm1": None,
        "blocks.0.local_mp.conv1": None,
        "patch_embed.proj.2.0": None,
        "head": None,
    },
    "efficientformerv2_s0": {
        "stages.2.blocks.4.token_mixer.q.conv": "qkv",
        "stages.3.downsample.attn.q.proj.conv": "qkv",
        "stages.2.blocks.4.token_mixer.talking_head1": None,
        "stages.0.blocks.0.mlp.mid.conv": None,
        "stages.1.downsample.conv.conv": "downsample",
        "head_dist": None,
    },
    "convnext_large_mlp": {
        "head.pre_logits.fc": "pre_logits",
        "head.fc": None,
        "stages.1.downsample.1": "downsample",
        "stages.1.downsample.0": None,
        "stages.0.blocks.0.conv_dw": None,
        "stem.0": None,
    },
    "resnet50d": {
        "conv1.0": None,
        "conv1.3": "stem",
        "conv1.6": "stem",
        "layer1.0.downsample.1": "downsample",
        "layer4.2.conv3": "conv3",
        "fc": None,
    },
    "resnet18": {"conv1": None, "layer2.0.downsample.0": "downsample", "layer2.0.downsample.1": None},
    "tf_efficientnetv2_s": {
        "conv_stem": None,
        "blocks.0.0.conv": "conv",
        "blocks.1.0.conv_exp": "conv_exp",
        "blocks.3.0.conv_dw": None,
        "blocks.3.0.se.conv_reduce": "se",
        "conv_head": "conv_head",
        "classifier": None,
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_pruned_and_kept_layers_per_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    pools = {group.name.removesuffix(".weight"): group.layer_type for group in find_groups(model, ["weight"])}
    assert {path: pools.get(path) for path in LAYERS[name]} == LAYERS[name]
    for path, layer in model.named_modules():
        if path in pools:
            assert not isinstance(layer, nn.Conv2d) or layer.groups < layer.in_channels, f"{path} is depth-wise"


SMALL = {
    "xcit_nano_12_p16_224": (64, {"depth": 2}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40)}),
    "efficientformerv2_s0": (64, {"img_size": 64, "depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40)}),
    "convnext_atto": (64, {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}),
    "convnextv2_atto": (64, {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}),
    "convnext_large_mlp": (64, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "head_hidden_size": 48}),
    "test_resnet": (64, {}),
    "resnet50d": (64, {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 24)}),
    "test_efficientnet": (64, {}),
    "swin_tiny_patch4_window7_224": (224, {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 4)}),
    "pvt_v2_b0": (64, {"embed_dims": (16, 16, 40, 48)}),
}


@pytest.mark.parametrize("name", SMALL)
def test_weights_at_half_sparsity_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    size, args = SMALL[name]
    model = redrawn(timm.create_model(name, num_classes=7, **args), 0)
    groups = find_groups(model, ["weight"])
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    pruned = prune(model, "lamp" if "net" in name else "dimap", sparsity=0.5).model
    zeros = [int((pruned.get_parameter(group.name) == 0).sum()) for group in groups]
    units = sum(group.units for group in groups)
    assert abs(sum(zeros) - units / 2) <= len({group.layer_type for group in groups}) / 2  # each pool is rounded
    inside = {group.name for group in groups}
    assert all(torch.equal(p, pruned.get_parameter(n)) for n, p in model.named_parameters() if n not in inside)
    assert bool(predict(pruned, x).isfinite().all())
    assert count(pruned, x).nonzero_macs < count(model, x).macs
    save(pruned, tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model)
    assert same_state(again, state(pruned))
    assert torch.equal(predict(again, x), predict(pruned, x))
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_state(plain, state(pruned))


@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith(("swin", "pvt"))])
def test_residual_and_block_groups_of_table_families(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert uniform_args(model) == {}
    if name == "test_efficientnet":
        with pytest.raises(
            BadInput, match=rf"neither it nor any other block of {type(model).__name__} returns its input plus"
        ):
            find_groups(model, ["block"])
    else:
        assert [group.whole_blocks for group in find_groups(model, ["block"])] == [True]
    if name == "test_efficientnet":  # its stages are one block each
        with pytest.raises(BadInput, match=r"^EfficientNet: it has no residual stream"):
            find_groups(model, ["residual"])
    else:
        assert {group.kind for group in find_groups(model, ["residual"])} == {"residual"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gc_efficientnetv2_rw_t", r"^blocks.3.0.se.conv_attn \(Conv2d\): not in the table"),
        ("efficientnet_cc_b0_4e", r"^blocks.4.0.conv_pw \(CondConv2d\): expected a Linear or Conv2d"),
    ],
)
def test_layers_missing_from_the_table_are_refused(name: str, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(BadInput, match=why):
        find_groups(model, ["weight"])


@pytest.mark.parametrize("name", ["resnet50d", "convnext_atto"])
def test_n_of_m_groups_are_along_the_input_channels(name: str) -> None:
    model = timm.create_model(name, **SMALL[name][1])
    pruned = prune(model, "n:m").model
    for group in find_groups(model, ["weight"]):
        weight = pruned.get_parameter(group.name)
        for index in weight.flatten(2).unbind(2) if weight.dim() == 4 else [weight]:  # (d_out, d_in) each
            assert ((index != 0).reshape(-1, 4).sum(1) == 2).all(), group.name


def test_n_of_m_of_a_convolution_by_hand() -> None:
    weight = torch.tensor([[[[1.0, 8.0]], [[2.0, 7.0]], [[3.0, 6.0]], [[4.0, 5.0]]]])  # (1, 4, 1, 2)
    mask = select({"w": weight}, 0.5, "2:4")["w"]
    assert mask.tolist() == [[[[False, True]], [[False, True]], [[True, False]], [[True, False]]]]
    with pytest.raises(BadInput, match=r"^w: rows of 4 weights cannot be divided into runs of 8"):
        select({"w": weight}, 0.5, "4:8")


def test_layers_of_a_sequential_that_have_only_numbers() -> None:
    inner = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    stem, head = [nn.Conv2d(3, 16, 8, 8), nn.Flatten(2)], [nn.Flatten(), nn.Linear(256, 10)]
    model = nn.Sequential(*stem, nn.Linear(16, 16), inner, *head)
    for method in ("magnitude", "dimap"):
        result = prune(model, method, sparsity=0.5, example_input=torch.randn(1, 3, 32, 32))
        assert list(result.masks) == ["2.weight", "3.0.weight", "3.2.weight"]
        assert result.sparsity == {"weight": 0.5}
