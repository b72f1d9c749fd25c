"""Tables of the layers that unstructured pruning prunes, per model family, after CAP's released recipes.

The recipes match layers by a prefix of their path. In XCiT this also matched LayerNorm scales and depth-wise
convolutions, and it did not match fused qkv. The tables here match full paths. With one exception (deep stems of
ResNet), the recipes do not prune stems and classifiers.

Source: CAP's recipes; EfficientFormer has none and follows the other transformers.
"""

from vitprune.architectures.unstructured import Table

STEM = "the stem has few weights, and all of the image depends on each"
HEAD = "the classifier, or the projection of CLIP"
DEPTHWISE = "depth-wise convolution: each channel has only a few weights"

XCIT = Table(
    prune={
        "blocks.#.attn.qkv": "qkv",
        "blocks.#.attn.proj": "proj",
        "blocks.#.mlp.fc1": "mlp",
        "blocks.#.mlp.fc2": "mlp",
        "cls_attn_blocks.#.attn.q": "qkv",
        "cls_attn_blocks.#.attn.k": "qkv",
        "cls_attn_blocks.#.attn.v": "qkv",
        "cls_attn_blocks.#.attn.proj": "proj",
        "cls_attn_blocks.#.mlp.fc1": "mlp",
        "cls_attn_blocks.#.mlp.fc2": "mlp",
    },
    keep={
        "patch_embed.proj.#.#": STEM,
        "pos_embed.token_projection": "position embedding",
        "blocks.#.local_mp.conv1": DEPTHWISE,
        "blocks.#.local_mp.conv2": DEPTHWISE,
        "head": HEAD,
    },
)

EFFICIENTFORMER = Table(
    prune={
        "stages.#.blocks.#.mlp.fc1": "mlp",
        "stages.#.blocks.#.mlp.fc2": "mlp",
        "stages.#.blocks.#.token_mixer.qkv": "qkv",
        "stages.#.blocks.#.token_mixer.proj": "proj",
        "stages.#.downsample.conv": "downsample",
    },
    keep={"stem.conv1": STEM, "stem.conv2": STEM, "head": HEAD, "head_dist": HEAD},
)

ATTENTIONS_V2 = ("stages.#.blocks.#.token_mixer", "stages.#.downsample.attn")  # the second one is strided

EFFICIENTFORMER_V2 = Table(
    prune={
        "stages.#.blocks.#.mlp.fc1.conv": "mlp",
        "stages.#.blocks.#.mlp.fc2.conv": "mlp",
        "stages.#.downsample.conv.conv": "downsample",
        "stages.#.downsample.attn.q.proj.conv": "qkv",
        **{f"{attn}.{leaf}.conv": "qkv" for attn in ATTENTIONS_V2 for leaf in ("q", "k", "v")},
        **{f"{attn}.proj.conv": "proj" for attn in ATTENTIONS_V2},
    },
    keep={
        "stem.conv1.conv": STEM,
        "stem.conv2.conv": STEM,
        "stages.#.blocks.#.mlp.mid.conv": DEPTHWISE,
        "stages.#.downsample.attn.q.local": DEPTHWISE,
        **{f"{attn}.{leaf}.conv": DEPTHWISE for attn in ATTENTIONS_V2 for leaf in ("stride_conv", "v_local")},
        **{f"{attn}.talking_head{n}": "talking heads: a few weights" for attn in ATTENTIONS_V2 for n in (1, 2)},
        "head": HEAD,
        "head_dist": HEAD,
    },
)

CONVNEXT = Table(
    prune={
        "stages.#.blocks.#.mlp.fc1": "mlp",
        "stages.#.blocks.#.mlp.fc2": "mlp",
        "stages.#.downsample.#": "downsample",
        "head.pre_logits.fc": "pre_logits",
    },
    keep={
        "stem.#": STEM,
        "stages.#.blocks.#.conv_dw": DEPTHWISE,
        "head.fc": HEAD,
    },
)

STAGES = range(1, 5)

RESNET = Table(
    prune={
        "conv1.#": "stem",  # deep stems of ResNet-C and -D; their first convolution is kept
        "maxpool.#": "stem",
        **{f"layer{stage}.#.conv{n}": f"conv{n}" for stage in STAGES for n in (1, 2, 3)},
        **{f"layer{stage}.#.downsample.#": "downsample" for stage in STAGES},
        **{f"layer{stage}.#.se.fc{n}": "se" for stage in STAGES for n in (1, 2)},
    },
    keep={
        "conv1": STEM,
        "conv1.0": STEM,
        **{f"layer{stage}.#.se.conv": "efficient channel attention: a few weights" for stage in STAGES},
        "fc": HEAD,
    },
)

EFFICIENTNET = Table(
    prune={
        "blocks.#.#.conv": "conv",
        "blocks.#.#.conv_exp": "conv_exp",
        "blocks.#.#.conv_s2d": "conv",
        "blocks.#.#.conv_pw": "conv_pw",
        "blocks.#.#.conv_pw.#": "conv_pw",  # MixNet splits a layer by kernel size
        "blocks.#.#.conv_pwl": "conv_pwl",
        "blocks.#.#.conv_pwl.#": "conv_pwl",
        "blocks.#.#.se.conv_reduce": "se",
        "blocks.#.#.se.conv_expand": "se",
        "conv_head": "conv_head",
    },
    keep={
        "conv_stem": STEM,
        "blocks.#.#.conv_dw": DEPTHWISE,
        "blocks.#.#.conv_dw.#": DEPTHWISE,
        "classifier": HEAD,
    },
)
