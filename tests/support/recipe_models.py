"""Small models of the architectures in recipes/, and a folder of random images to train them on."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from tests.support.model_zoo import PVT, SWIN, VIT

LAYERS = {"num_classes": 7, "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "pvt": ("pvt_v2_b0", PVT | {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}),
    "xcit": ("xcit_nano_12_p16_224", LAYERS | {"depth": 2, "embed_dim": 32, "num_heads": 2, "cls_attn_layers": 1}),
    "convnext": ("convnext_tiny", LAYERS | {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "resnet50d": ("resnet50d", LAYERS | {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    "tf": ("test_efficientnet", LAYERS),
}


def stand_in(name: str) -> nn.Module:
    """Return a small float32 model of a recipe's family."""
    result = next(made for start, made in STAND_INS.items() if name.startswith(start))
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(result[0], **result[1])
    return model


def write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
