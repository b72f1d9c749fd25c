"""Small models of every family beside those of tiny_models, and which kinds of group each can lose or is refused."""

from tests.support.tiny_models import ZOO

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
PROVEN = {
    "vit_base_patch16_siglip_224": "ffn head attention block",
    "beit_base_patch16_224": "ffn head attention weight residual block",
    "swinv2_tiny_window8_256": "ffn head attention weight residual block",
    "xcit_nano_12_p16_224": "ffn head weight residual block",
    "cait_xxs24_224": "ffn head attention weight residual block",
    "levit_128s": "ffn head weight residual block",
    "levit_conv_128s": "ffn head residual block",
    "pit_ti_224": "ffn head attention residual block",
    "tiny_vit_5m_224": "ffn head attention residual",
    "efficientformer_l1": "ffn head residual block",
    "convit_tiny": "ffn head attention weight residual block",
    "coat_tiny": "ffn weight block",
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
    "vit_small_patch16_rope_mixed_224": "block",
    "efficientvit_m0": "ffn weight block",  # whose MLPs nobody named
}
REFUSED = [
    ("xcit_nano_12_p16_224", "attention", r"^blocks.0.attn \(XCA\): attention among channels"),
    ("levit_128s", "attention", r"^stages.0.blocks.0.attn \(Attention\): its keys and values differ in width"),
    (
        "efficientformer_l1",
        "attention",
        r"^stages.3.blocks.2.token_mixer \(Attention\): its keys and values differ in width",
    ),
    ("efficientvit_b0", "attention", r"^stages.2.blocks.1.context_module.main \(LiteMLA\): its aggregation mixes"),
    ("mvitv2_tiny", "attention", r"^stages.0.blocks.0.attn \(MultiScaleAttention\): pooling shares its weights"),
    ("eva02_tiny_patch14_224", "attention", r"^blocks.0.attn \(EvaAttention\): where positions are rotary, they turn"),
    ("vit_small_patch16_rope_224", "attention", r"^blocks.0.attn \(AttentionRope\): where positions are rotary"),
    ("vit_small_patch16_rope_mixed_224", "head", r"^rope \(RotaryEmbeddingMixed\): each head of each block has angles"),
    ("coat_tiny", "head", r"^crpe1 \(ConvRelPosEnc\): the blocks of a stage share it"),
    ("mobilevitv2_050", "head", r"^stages.2.1.transformer.0.attn \(LinearSelfAttention\): it has no heads"),
    ("poolformer_s12", "head", "^MetaFormer: there is no attention in it"),
    (
        "convnextv2_atto",
        "ffn",
        r"^stages.0.blocks.0.mlp.grn \(GlobalResponseNorm\): a norm .* couples its hidden units",
    ),
    ("resnext50_32x4d", "ffn", r"^layer1.0.conv2 \(Conv2d\): what it does to hidden units"),
    ("mixer_s32_224", "head", "^MlpMixer: there is no attention in it"),
    ("volo_d1_224", "head", r"^network.0.0.attn \(OutlookAttention\): this attention is not understood yet"),
    ("visformer_tiny", "ffn", r"^stage1.0.mlp \(SpatialMlp\): this MLP is not understood yet"),
    ("gmlp_s16_224", "ffn", r"^blocks.0.mlp_channels.gate.norm|^blocks.0.mlp_channels.gate "),
    ("coat_tiny", "residual", "^CoaT: with a narrower residual stream it does not run "),
    *(
        (
            name,
            "block",
            rf"^{block}: neither it nor any other block of \w+ gives back what it is given",
        )
        for name, block in {
            "resnet50": r"layer1.0 \(Bottleneck\)",  # an activation runs over the sum
            "resnext50_32x4d": r"layer1.0 \(Bottleneck\)",
            "seresnet50": r"layer1.0 \(Bottleneck\)",
            "tiny_vit_5m_224": r"stages.0.blocks.0 \(MBConv\)",  # a convolution runs over the stream between two sums
            "mvitv2_tiny": r"stages.0.blocks.0 \(MultiScaleBlock\)",  # it gives back a size, too
            "maxvit_pico_rw_256": r"stages.0.blocks.0 \(MaxxVitBlock\)",  # the first of a stage, whose stride is 2
            "maxvit_rmlp_pico_rw_256": r"stages.0.blocks.0 \(MaxxVitBlock\)",
            "test_efficientnet": r"blocks.1.0 \(EdgeResidual\)",
        }.items()
    ),
]
