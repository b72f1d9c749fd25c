"""A real dense model: timm's DINOv2 ViT-S as the backbone of a saliency network, which is somebody else's code."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (384, 256, 128, 64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224


class Decoder(nn.Module):
    """Three transposed convolutions from tokens to a map of logits."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.add_module(f"upconv{number + 1}", nn.ConvTranspose2d(WIDTHS[number], WIDTHS[number + 1], 4, 2, 1))
            self.add_module(f"bn{number + 1}", nn.BatchNorm2d(WIDTHS[number + 1]))
        self.final_conv = nn.Conv2d(WIDTHS[-1], 1, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """Return a map (B, 1, 8 H, 8 W) of a grid of features (B, 384, H, W)."""
        for number in range(1, 4):
            grid = F.relu(self.get_submodule(f"bn{number}")(self.get_submodule(f"upconv{number}")(grid)))
        output: Tensor = self.final_conv(grid)
        return output


class Saliency(nn.Module):
    """Backbone and decoder; returns the logits of the heatmap."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_small_patch14_dinov2", img_size=SIDE, num_classes=0)
        self.decoder, self.image_size = Decoder(), SIDE

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 1, 224, 224) of images of 224 x 224 pixels."""
        tokens = self.backbone.forward_features(images)[:, 1:]  # without the class token
        grid = tokens.transpose(1, 2).unflatten(2, (SIDE // 14, SIDE // 14))
        return F.interpolate(self.decoder(grid), size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def load_saliency(folder: Path) -> nn.Module:
    """Load the dense model in float32, in evaluation mode."""
    model = Saliency()
    weights = load_file(folder / "vit_small_dinov2_saliency.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def heatmap_agreement(heatmaps: Tensor, dense: Tensor) -> tuple[float, float]:
    """Return the mean correlation and the mean IoU at 0.5 of heatmaps (N, 1, H, W) with those of the dense model."""
    first, second = heatmaps.flatten(1), dense.flatten(1)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(first, second, strict=True)])
    both, either = (first > 0.5) & (second > 0.5), (first > 0.5) | (second > 0.5)
    overlap = both.sum(1) / either.sum(1).clamp_min(1)
    return float(correlation.nan_to_num(0.0).mean()), float(overlap[either.any(1)].mean())
