"""Image transforms of timm for a model, and augmentation presets for training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.auto_augment import RandAugment
from timm.models import get_model_input_config
from torch import nn
from torch.nn import functional
from torchvision.transforms import Compose

from vitprune.errors import BadInput
from vitprune.runtime.input_size import input_size
from vitprune.runtime.wrappers import is_timm_model

# Arguments of timm.data.create_transform for training. `deit` is the recipe of DeiT (Touvron 2021, table 9); the six
# after it are CAP's, whose `deit` is called deit_wide here: its aspect ratios vary more (docs/decisions/0012). timm
# ignores color jitter in combination with RandAugment.
ERASED: dict[str, Any] = {"re_prob": 0.25, "re_mode": "pixel"}
CAP: dict[str, Any] = {"color_jitter": 0.3, "interpolation": "random", "scale": (0.08, 1.0), "ratio": (0.75, 1.33)}
WIDE: dict[str, Any] = CAP | ERASED | {"ratio": (0.67, 1.5)}
TIMM_PRESETS: dict[str, dict[str, Any]] = {
    "light": {"color_jitter": None},
    "deit": {"color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1", **ERASED},
    "light1": CAP | {"auto_augment": "rand-m0-n2-inc1"},
    "light2": CAP | {"auto_augment": "rand-m10-n2-inc1"},
    "medium1": CAP | {"auto_augment": "rand-m15-n2-inc1"},  # timm's maximum is 10: the same as light2
    "medium2": CAP | {"auto_augment": "rand-m15-n2-inc1"},  # in CAP, Mixup and CutMix differ
    "deit_wide": WIDE | {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "deit_light": WIDE | {"auto_augment": "rand-m6-mstd0.5-inc1"},
}
DEGREES, SHIFT, SCALE = 10.0, 1 / 8, 0.1  # of `digits`: largest rotation, shift by a fraction of the size, change
AUGMENTATIONS = ("none", "digits", *TIMM_PRESETS)


@dataclass(frozen=True)
class Transform:
    """Transform from a Pillow image to the input of a model.

    Attributes:
        image: Maps a Pillow image of mode `mode` to float32 of `shape`.
        mode: Pillow mode, "RGB" or "L".
        shape: (C, H, W).
        random: Whether `image` draws random numbers.
        batch: Augmentation of a batch: maps images (B, C, H, W) and uniform numbers (B, 4) to images; None for none.
        orient: Whether the EXIF orientation of an image file is applied when it is decoded.
    """

    image: Callable[[Image.Image], torch.Tensor]
    mode: str
    shape: tuple[int, int, int]
    random: bool
    batch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    orient: bool = True


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's data config for the model's actual input size and channels.

    timm's own function returns the published input size and three channels even if the model was created with another
    img_size or in_chans. For another size, crop_pct is set to 1: the published value belongs to the published size.
    """
    config: dict[str, Any] = resolve_model_data_config(model)
    height, width = get_model_input_config(model)["input_size"][1:]
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    transformed = getattr(model, "pretrained_cfg", {}).get("first_conv") == []  # no layer reads the image itself
    channels = config["input_size"][0] if first is None or transformed else first.in_channels
    if (height, width) != tuple(config["input_size"][1:]):
        config["crop_pct"] = 1.0
    if channels == 1:
        config["mean"] = (sum(config["mean"]) / len(config["mean"]),)
        config["std"] = (sum(config["std"]) / len(config["std"]),)
    config["input_size"] = (channels, height, width)
    return config


def example_input(model: nn.Module, batch: int) -> torch.Tensor:
    """Return seeded noise of the input size, (batch, C, H, W), or tokens (batch, T) of a causal language model."""
    context = getattr(model, "pretrained_cfg", {}).get("context_length")
    if context:
        return torch.zeros(batch, context, dtype=torch.int64)
    size = data_config(model)["input_size"] if is_timm_model(model) else input_size(model)
    return torch.randn((batch, *size), generator=torch.Generator().manual_seed(0))


def transform(config: dict[str, Any], augment: str | None = None, orient: bool = True) -> Transform:
    """Create the transform of a data config, for evaluation or training.

    Args:
        config: timm's data config.
        augment: None for evaluation, or a preset. none: as for evaluation. light: random resized crop and flip. deit:
            also RandAugment and random erasing. light1, light2, medium1, medium2: CAP's, with RandAugment. deit_light,
            deit_wide: CAP's, also with random erasing and more aspect ratios. digits: rotation by +-10 degrees, shift
            by +-1/8, scale 0.9..1.1, no flip.
        orient: Apply EXIF orientations.

    Returns:
        The transform.

    Raises:
        BadInput: unknown preset, or the model has neither 1 nor 3 input channels.
    """
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise BadInput(f"model.args.in_chans: {channels} channels; images have 1 (gray) or 3 (color)")
    if augment is not None and augment not in AUGMENTATIONS:
        raise BadInput(f"augment: {augment!r} is unknown; use one of {', '.join(AUGMENTATIONS)}")
    shape = tuple(config["input_size"])
    if augment in TIMM_PRESETS:
        return Transform(_augmented(config, TIMM_PRESETS[augment]), "RGB", shape, True, None, orient)
    batch = None
    if augment == "digits":
        # pixels from outside the image are black, in the normalized scale of each channel
        black = [-mean / std for mean, std in zip(config["mean"], config["std"], strict=True)]
        batch = RandomAffine(torch.tensor(black).view(1, -1, 1, 1))
    return Transform(create_transform(**config), "L" if channels == 1 else "RGB", shape, False, batch, orient)


def _augmented(config: dict[str, Any], preset: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    if config["input_size"][0] == 3:
        return _limit_posterize(create_transform(**(config | preset), is_training=True))
    # timm's augmentations need color: a gray image is repeated to three channels, and one is kept
    size, mean, std = (3, *config["input_size"][1:]), tuple(config["mean"]) * 3, tuple(config["std"]) * 3
    color = config | {"input_size": size, "mean": mean, "std": std}
    return Gray(_limit_posterize(create_transform(**(color | preset), is_training=True)))


def _limit_posterize(compose: Compose) -> Callable[[Image.Image], torch.Tensor]:
    """Prevent RandAugment from posterizing to 0 bits: black before Pillow 13, a ValueError since (timm 1.0.31)."""
    for step in compose.transforms:
        if isinstance(step, RandAugment):
            for operation in step.ops:
                if operation.name == "PosterizeIncreasing":
                    operation.magnitude_max = 9  # of 10; at 10 the number of bits is 0
    return compose  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Gray:
    """Apply a color transform to a gray image."""

    color: Callable[[Image.Image], torch.Tensor]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return (1, H, W) for a Pillow image of any mode."""
        return self.color(image.convert("L").convert("RGB"))[:1]


@dataclass(frozen=True, eq=False)
class RandomAffine:
    """Rotate each image of a batch by up to 10 degrees, shift it by up to 1/8 and scale it by up to 10 %.

    Attributes:
        black: Normalized value of black, (1, C, 1, 1), for pixels from outside the image.
    """

    black: torch.Tensor

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Transform images (B, C, H, W) by numbers (B, 4) in 0..1, with bilinear interpolation."""
        angle, across, down, size = (2 * numbers - 1).unbind(1)
        angle = angle * math.radians(DEGREES)
        size = 1 + SCALE * size
        cosine, sine = torch.cos(angle) / size, torch.sin(angle) / size
        # coordinates of grid_sample range from -1 to 1: a shift by the full width is 2
        across, down = 2 * SHIFT * across, 2 * SHIFT * down
        theta = torch.stack([cosine, -sine, across, sine, cosine, down], dim=1).view(-1, 2, 3)
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)  # (B, H, W, 2)
        moved = functional.grid_sample(images - self.black, grid, padding_mode="zeros", align_corners=False)
        return moved + self.black
