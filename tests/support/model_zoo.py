"""Small timm models for the tests: configurations, makers, inputs, masks, and which kinds of group each supports."""

import copy
import functools
import random
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitprune import count
from vitprune.data import example_input

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
ODD = {"img_size": 24, "patch_size": 8, "embed_dim": 45, "depth": 3, "num_heads": 5, "mlp_ratio": 2.2, "num_classes": 5}
EXTRA = {"init_values": 0.1, "reg_tokens": 2, "qkv_bias": False, "no_embed_class": True, "global_pool": "avg"}
SWIN = {
    "img_size": 32,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (3, 6),
    "window_size": 4,
    "num_classes": 7,
}
PVT = {
    "depths": (2, 1, 1),
    "embed_dims": (16, 24, 40),
    "num_heads": (2, 3, 4),
    "mlp_ratios": (2.0, 1.5, 2.0),
    "sr_ratios": (4, 2, 1),
    "num_classes": 7,
}
ZOO = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "thin": ("vit_tiny_patch16_224", VIT | {"mlp_ratio": 0.5}),
    "deit": ("deit_tiny_patch16_224", VIT | {"mlp_ratio": 3.0}),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "odd": ("vit_tiny_patch16_224", ODD),
    "extra": ("vit_tiny_patch16_224", VIT | EXTRA),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "pvt": ("pvt_v2_b0", PVT),
    "pvt-linear": ("pvt_v2_b2_li", PVT),
}
# timm name -> arguments that make it small
SMALL = {
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 1),
        "num_heads": (3, 6),
    },
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2, "embed_dim": 48},
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4},
    "levit_128s": {"img_size": 64, "embed_dim": (48, 64, 80), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)},
    "levit_conv_128s": {
        "img_size": 64,
        "embed_dim": (48, 64, 80),
        "key_dim": 8,
        "num_heads": (2, 3, 4),
        "depth": (1, 1, 1),
    },
    "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40)},
    "convit_tiny": {"img_size": 64, "depth": 3, "embed_dim": 12, "local_up_to_layer": 2},
    "coat_tiny": {
        "img_size": 64,
        "embed_dims": (32, 48, 48, 48),
        "serial_depths": (1, 1, 1, 1),
        "parallel_depth": 1,
    },
    "twins_pcpvt_small": {"embed_dims": (16, 24, 32, 48), "num_heads": (2, 3, 4, 6), "depths": (1, 1, 1, 1)},
    "twins_svt_small": {"embed_dims": (16, 24, 32, 48), "num_heads": (2, 3, 4, 6), "depths": (2, 1, 1, 1)},
    "maxvit_pico_rw_256": {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "pit_ti_224": {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8)},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (2, 3, 4, 6)},
    "efficientvit_b0": {"depths": (1, 1, 1, 1)},
    "efficientvit_m0": {"embed_dim": (32, 48, 64), "depth": (1, 1, 2)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 24)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1)},
    "seresnet50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 24)},
}
ROPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
ROTARY = ("eva02_tiny_patch14_224", "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224")
SMALL |= dict.fromkeys((*ROTARY, "vit_small_patch16_dinov3"), ROPE)
SMALL["vit_base_patch16_siglip_224"] = ZOO["vit"][1]
SMALL |= {  # attentions of unusual classes
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 32, 48, 64), "num_heads": (2, 4, 3, 4)},
    "hiera_tiny_224": {"embed_dim": 24, "stages": (1, 1, 1, 1), "num_heads": 1},
    "visformer_tiny": {"embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3},
    "vit_relpos_small_patch16_224": ROPE,
    "vit_srelpos_small_patch16_224": ROPE,
    "vit_pwee_patch16_reg1_gap_256": ROPE,
    "vit_dpwee_patch16_reg1_gap_256": ROPE,
    "samvit_base_patch16_224": ROPE | {"global_attn_indexes": (1,), "window_size": 2},
}
# kinds of group that are verified on each model
PROVEN = {
    "vit_base_patch16_siglip_224": "ffn head attention block",
    "beit_base_patch16_224": "ffn head attention weight residual block",
    "swinv2_tiny_window8_256": "ffn head attention weight residual block",
    "xcit_nano_12_p16_224": "ffn head attention weight residual block",
    "cait_xxs24_224": "ffn head attention weight residual block",
    "levit_128s": "ffn head weight residual block",
    "levit_conv_128s": "ffn head residual block",
    "pit_ti_224": "ffn head attention residual block",
    "tiny_vit_5m_224": "ffn head attention residual",
    "efficientformer_l1": "ffn head residual block",
    "convit_tiny": "ffn head attention weight residual block",
    "coat_tiny": "ffn weight residual block",
    "mvitv2_tiny": "head residual",
    "twins_pcpvt_small": "ffn head attention weight residual block",
    "twins_svt_small": "ffn head attention residual block",
    "mobilevit_xxs": "ffn head attention residual block",
    "mobilevitv2_050": "ffn residual block",
    "maxvit_pico_rw_256": "ffn head attention residual",
    "maxvit_rmlp_pico_rw_256": "head residual",
    "poolformer_s12": "ffn residual block",
    "efficientvit_b0": "ffn head residual block",
    "convnext_atto": "ffn residual block",
    "resnet50": "ffn residual",
    "seresnet50": "ffn residual",
    "eva02_tiny_patch14_224": "ffn head weight residual block",
    "vit_small_patch16_rope_224": "ffn head weight residual block",
    "vit_small_patch16_dinov3": "head block",
    "test_efficientnet": "ffn",
    "convnextv2_atto": "block",
    "vit_small_patch16_rope_mixed_224": "ffn head block",  # frequencies (blocks, heads, c) outside of the blocks
    "vit_srelpos_small_patch16_224": "head attention",  # one bias table for all blocks
    "vit_pwee_patch16_reg1_gap_256": "ffn head",  # one layer writes hidden units, queries, keys and values
    "vit_dpwee_patch16_reg1_gap_256": "ffn head",
    "efficientvit_m0": "ffn weight block",  # whose MLPs are of an unknown class
    "davit_tiny": "head attention",
    "hiera_tiny_224": "head attention",
    "visformer_tiny": "ffn head attention",
    "vit_relpos_small_patch16_224": "head",
    "samvit_base_patch16_224": "head",
}
# model, kind, group that is left out, reason
LEFT_OUT = [
    ("xcit_nano_12_p16_224", "attention", "blocks.0.attn", r"^blocks.0.attn \(XCA\): it is summed over"),
    ("davit_tiny", "attention", "stages.0.blocks.0.1.attn", r"^stages.0.blocks.0.1.attn \(ChannelAttention\): "),
    ("visformer_tiny", "ffn", "stage1.0.mlp", r"^stage1.0.mlp \(SpatialMlp\): .*a convolution of 8 groups"),
    ("volo_d1_224", "head", "network.0.0.attn.heads", r"^network.0.0.attn \(OutlookAttention\): it is summed over"),
]
# model, kind, error message
REFUSED = [
    ("levit_128s", "attention", r"^stages.0.blocks.0.attn \(Attention\): its keys and values differ in width"),
    (
        "efficientformer_l1",
        "attention",
        r"^stages.3.blocks.2.token_mixer \(Attention\): its keys and values differ in width",
    ),
    ("efficientvit_b0", "attention", r"^stages.2.blocks.1.context_module.main \(LiteMLA\): .* convolution of 12"),
    ("mvitv2_tiny", "attention", r"^stages.0.blocks.0.attn \(MultiScaleAttention\): .* a norm over the head"),
    ("eva02_tiny_patch14_224", "attention", r"^blocks.0.attn \(EvaAttention\): its forward pass needs the old sizes"),
    ("vit_small_patch16_rope_224", "attention", r"^blocks.0.attn \(AttentionRope\): its forward pass needs the"),
    (
        "vit_small_patch16_rope_mixed_224",
        "attention",
        r"^blocks.0.attn \(AttentionRope\): rope.freqs: none of its axes",
    ),
    (
        "vit_pwee_patch16_reg1_gap_256",
        "attention",
        r"^blocks.0 \(ParallelScalingBlock\): blocks.0.in_proj.bias: only a ",
    ),
    ("coat_tiny", "head", r"^model \(CoaT\): serial_blocks1.0.factoratt_crpe.qkv.bias: only a part of"),
    (
        "efficientvit_m0",
        "head",
        r"^stages.0.blocks.0.mixer.m.attn \(CascadedGroupAttention\): .*biases: only a part of its",
    ),
    ("mobilevitv2_050", "head", r"^ByobNet: there is no attention with heads in it"),
    ("poolformer_s12", "head", "^MetaFormer: there is no attention with heads in it"),
    (
        "convnextv2_atto",
        "ffn",
        r"^stages.0.blocks.0.mlp \(GlobalResponseNormMlp\): .*grn \(GlobalResponseNorm\): mean runs over it",
    ),
    ("resnext50_32x4d", "ffn", r"^layer1.0 \(Bottleneck\): layer1.0.conv2 \(Conv2d\): it runs through a"),
    ("mixer_s32_224", "head", "^MlpMixer: there is no attention with heads in it"),
    ("gmlp_s16_224", "ffn", r"^blocks.0.mlp_channels \(GatedMlp\): .*gate.norm \(LayerNorm\): a norm couples"),
    *(
        (
            name,
            "block",
            rf"^{block}: neither it nor any other block of \w+ returns its input plus something",
        )
        for name, block in {
            "resnext50_32x4d": r"layer1.0 \(Bottleneck\)",
            "mvitv2_tiny": r"stages.0.blocks.0 \(MultiScaleBlock\)",  # it also returns a size
            "maxvit_pico_rw_256": r"stages.0.blocks.0 \(MaxxVitBlock\)",  # the first of a stage, whose stride is 2
            "maxvit_rmlp_pico_rw_256": r"stages.0.blocks.0 \(MaxxVitBlock\)",
            "test_efficientnet": r"blocks.1.0 \(EdgeResidual\)",
        }.items()
    ),
]


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model of ZOO in eval mode with weights drawn by `redrawn`."""
    return copy.deepcopy(_made(name, seed)).to(dtype)


@functools.cache
def _made(name: str, seed: int) -> nn.Module:
    architecture, args = ZOO[name]
    return redrawn(timm.create_model(architecture, **args), seed)


@torch.no_grad()
def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights in place with std 0.1 (norm scales around 1), so that every unit affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = "norm" in name.split(".")[-2:][0] and name.endswith("weight")
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + float(scale))
    return model.eval()


def with_simulated_clock(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Measure latencies by a clock that only blocks advance, by 0.8 to 1.2 ms: results do not depend on the machine."""
    draw = random.Random(0)
    clock = SimpleNamespace(now=0.0)

    def advance(module: nn.Module, args: object) -> None:
        clock.now += draw.uniform(0.8, 1.2) / 1000

    for block in model.blocks:
        block.register_forward_pre_hook(advance)
    monkeypatch.setattr("vitprune.evaluation.latency.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return model


def images(model: nn.Module, number: int = 3, seed: int = 1) -> Tensor:
    """Return noise of the model's input size and dtype."""
    generator = torch.Generator().manual_seed(seed)
    patches = model.patch_embed
    size = (patches.proj.in_channels, *(patches.img_size if isinstance(patches, PatchEmbed) else (32, 32)))
    return torch.randn((number, *size), generator=generator, dtype=next(model.parameters()).dtype)


def batches(model: nn.Module, number: int = 2, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return batches of noise with labels."""
    return [(images(model, size, 10 + n), (torch.arange(size) + n) % model.num_classes) for n in range(number)]


def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits in eval mode, without gradients."""
    with torch.no_grad():
        return model.eval()(inputs)


def noisy(seed: int = 0) -> nn.Module:
    """Return a model with dropout, whose training depends on the random state."""
    model = tiny("vit", seed)
    for block in model.blocks:
        block.mlp.drop1.p = 0.2
    return model


def cost(model: nn.Module, what: str) -> int:
    """Return the number of parameters (`what` is "params") or of MACs per image."""
    result = count(model, example_input(model, 1))
    return result.params if what == "params" else result.macs


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Return whether the state dict equals an earlier copy bit by bit."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def random_masks(groups: list, removed: int | float, seed: int = 0) -> dict[str, Tensor]:
    """Return masks that remove a number (int) or fraction (float) of units from each group, equally from each head."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups:
        row = group.shape[-1] if len(group.shape) > 1 else group.units
        count = round(removed * row) if isinstance(removed, float) else removed
        order = torch.rand((group.units // row, row), generator=generator).argsort(1)
        masks[group.name] = (order >= count).view(group.shape)
    return masks
