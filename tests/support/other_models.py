"""Small models of other libraries than timm, with random weights, made by the code of these libraries."""

from collections.abc import Callable

import open_clip
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.models.rf_detr import modeling_rf_detr as rf_detr

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
VIT = SMALL | {"image_size": 64, "patch_size": 16}
DINO = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
STAGES = {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4]}
PYRAMID |= {"mlp_ratios": [2, 2, 2, 2]}


class SmallImages(nn.Module):
    """SigLIP 2 for images of 64 x 64 pixels instead of patches, their mask and their shape."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.image_size = encoder, 64

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images (B, 3, 64, 64)."""
        patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=images.device)
        shapes = torch.full((len(images), 2), 4, dtype=torch.int64)
        return self.encoder(patches, mask, shapes).last_hidden_state


class PixelNorm(nn.LayerNorm):
    """A norm over the channels of every pixel, as in ConvNeXt of transformers."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalize pixels (B, C, H, W)."""
        return super().forward(pixels.movedim(1, -1)).movedim(-1, 1)


class PixelStream(nn.Module):
    """A residual stream (B, C, H, W) of as many channels as columns."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(8), nn.Conv2d(8, 12, 1), nn.GELU(), nn.Conv2d(12, 8, 1)) for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (B, 3, H, W)."""
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def _detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {"d_model": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    return transformers.DetrModel(
        transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes)
    )


def _sam() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 128, "output_channels": 16}
    sizes |= {"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1]}
    return transformers.SamVisionModel(transformers.SamVisionConfig(**sizes))


def _swin_v2_of_torchvision() -> nn.Module:
    parts = torchvision.models.swin_transformer
    return parts.SwinTransformer(
        [4, 4], 32, [1, 2], [2, 4], [4, 4], block=parts.SwinTransformerBlockV2, downsample_layer=parts.PatchMergingV2
    )


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=10)),
    "vit features": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VIT, num_labels=10)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO, mlp_ratio=2)),
    "dinov2 gated": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**DINO, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "dinov2 registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
    "swin": lambda: transformers.SwinModel(transformers.SwinConfig(**STAGES)),
    "swinv2": lambda: transformers.Swinv2Model(transformers.Swinv2Config(**STAGES)),
    "beit": lambda: transformers.BeitModel(transformers.BeitConfig(**VIT, use_relative_position_bias=True)),
    "hiera": lambda: transformers.HieraModel(
        transformers.HieraConfig(image_size=[64, 64], embed_dim=32, num_heads=[1, 2, 4, 8], depths=[1, 1, 2, 1])
    ),
    "pvtv2": lambda: transformers.PvtV2Model(transformers.PvtV2Config(image_size=64, **PYRAMID)),
    "segformer": lambda: transformers.SegformerModel(transformers.SegformerConfig(**PYRAMID)),
    "siglip2": lambda: SmallImages(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SMALL))),
    "rf-detr": lambda: rf_detr.RfDetrDinov2Backbone(rf_detr.RfDetrDinov2Config(**DINO, out_features=["stage2"])),
    "sam": _sam,
    "detr": _detr,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "torchvision vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10),
    "torchvision swin": lambda: torchvision.models.SwinTransformer([4, 4], 32, [1, 2], [2, 4], [4, 4]),
    "torchvision swin v2": _swin_v2_of_torchvision,
    "torchvision maxvit": lambda: torchvision.models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0),
    "open_clip": lambda: open_clip.model.VisionTransformer(
        image_size=64, patch_size=16, width=64, layers=2, heads=4, mlp_ratio=2.0, output_dim=32
    ),
}
MODELS = TRANSFORMERS | OTHERS


def make_model(name: str, seed: int = 0) -> nn.Module:
    """Create a model of `MODELS` with seeded random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().eval()
