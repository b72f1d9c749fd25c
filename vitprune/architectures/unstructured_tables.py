"""Layers that unstructured pruning prunes in some model families, after DIMAP and CAP's released recipes.

The recipes match layers by a prefix of their path. In XCiT this also matched LayerNorm scales and depth-wise
convolutions, and it did not match fused qkv. The patterns here match full paths. With one exception (deep stems of
ResNet), the recipes do not prune stems and classifiers.

Source: DIMAP's layers for ViT and Swin; CAP's recipes; EfficientFormer has none and follows the other transformers.
"""

from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientformer import EfficientFormer
from timm.models.efficientformer_v2 import EfficientFormerV2
from timm.models.efficientnet import EfficientNet
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import nn

from vitprune.architectures.unstructured import Recipe

TRANSFORMER = ("qkv", "proj", "mlp")  # types of layers
CONVOLUTIONS = ("conv", "conv_exp", "conv_pw", "conv_pwl", "conv_head", "se")
VIT = Recipe(keep=("attn_pool.*",))
RECIPES: dict[type[nn.Module], Recipe] = {
    VisionTransformer: VIT,
    VisionTransformerDistilled: VIT,
    SwinTransformer: Recipe(keep=("*.downsample.reduction",)),
    PyramidVisionTransformerV2: Recipe(keep=("*.attn.sr", "*.downsample.proj")),
    Xcit: Recipe(("pos_embed.token_projection",), TRANSFORMER),
    EfficientFormer: Recipe((), (*TRANSFORMER, "downsample")),
    EfficientFormerV2: Recipe(("*.talking_head?",), (*TRANSFORMER, "downsample"), {"*.attn.q.proj.conv": "qkv"}),
    ConvNeXt: Recipe((), ("mlp", "downsample", "pre_logits"), {"head.pre_logits.fc": "pre_logits"}),
    ResNet: Recipe(
        ("*.se.conv",),  # efficient channel attention: a few weights
        ("stem", "conv1", "conv2", "conv3", "downsample", "se"),
        {"conv1.?": "stem", "maxpool.?": "stem", "*.se.fc?": "se"},
    ),
    EfficientNet: Recipe(
        ("*.conv_dw", "*.conv_dw.?"),
        CONVOLUTIONS,
        {"*.se.conv_reduce": "se", "*.se.conv_expand": "se", "blocks.*.conv": "conv", "*.conv_s2d": "conv"},
    ),
}
