"""Mixup and CutMix of image batches."""

from collections.abc import Callable

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F

from vitprune.errors import BadInput

# images (B, C, H, W), labels (B,) -> images, soft labels (B, classes)
MixFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mixer(mixup: float, cut: float, prob: float, classes: int, seed: int | np.random.Generator) -> MixFn:
    """Create the function that mixes the batches of a training.

    Without Mixup, it is `cutmix`. With Mixup, it is timm's, which also draws between Mixup and CutMix if both are set;
    image i is paired with image B - 1 - i. Labels are not smoothed.

    Args:
        mixup: Parameter of Mixup's Beta distribution, 0 to disable.
        cut: Parameter of CutMix's Beta distribution, 0 to disable.
        prob: Probability that a batch is mixed.
        classes: Number of classes.
        seed: Seed or generator; each call draws the next numbers.

    Returns:
        Maps images (B, C, H, W) and labels (B,) to images and soft labels (B, classes). It raises BadInput if the
        labels are no class indices.

    Source: Zhang et al. 2018 (Mixup), Yun et al. 2019 (CutMix), DeiT for the combination.
    """
    generator = np.random.default_rng(seed)
    mixing = Mixup(mixup, cut, prob=prob, label_smoothing=0.0, num_classes=classes) if mixup else None

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        _check_labels(labels, classes)
        if mixing is not None:
            return _seeded(mixing, images, labels, int(generator.integers(2**32)))
        if prob < 1 and generator.random() >= prob:
            return images, F.one_hot(labels, classes).to(images.dtype)
        return cutmix(images, labels, classes, cut, generator)

    return mix


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.dim() != 1:
        why = f"labels are {labels.dtype} of shape {tuple(labels.shape)}, not class indices (B,)"
        raise BadInput(f"train.mixup, train.cutmix: {why}; set both to 0")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        why = f"label {int(wrong[0])} is no class, so its image cannot be mixed"
        raise BadInput(f"train.mixup, train.cutmix: {why}; leave it out, or set both to 0")


def _seeded(mixing: Mixup, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Run timm's Mixup, which uses NumPy's global generator, with a seed; restore the generator."""
    middle, odd, state = len(images) // 2, len(images) % 2, np.random.get_state()
    np.random.seed(seed)
    try:  # timm needs an even batch: the middle image of an odd one is doubled and dropped again
        both = (torch.cat([tensor[: middle + odd], tensor[middle:]]) for tensor in (images, labels))
        mixed = mixing(*both)
    finally:
        np.random.set_state(state)
    mixed_images, soft_labels = (torch.cat([x[: middle + odd], x[middle + 2 * odd :]]) for x in mixed)
    return mixed_images, soft_labels.to(images.dtype)


def cutmix(
    images: Tensor, labels: Tensor, classes: int, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Paste one box of a shuffled batch into the batch.

    The remaining share of the image is max(b, 1 - b) with b from Beta(alpha, alpha). The box is centered at a uniform
    point and clipped to the image; labels are weighted by the clipped area.

    Args:
        images: (B, C, H, W).
        labels: (B,) int64.
        classes: Number of classes.
        alpha: Parameter of the Beta distribution.
        generator: Random generator.

    Returns:
        Images (B, C, H, W) and soft labels (B, classes).

    Source: Yun et al. 2019, algorithm 1; max(b, 1 - b) as in UP-ViTs' fine-tuning.
    """
    height, width = images.shape[-2:]
    drawn = generator.beta(alpha, alpha)
    remaining = max(drawn, 1 - drawn)
    partner = generator.permutation(len(images))
    top, bottom = _span(height, remaining, generator)
    left, right = _span(width, remaining, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    one_hot = F.one_hot(labels, classes).to(images.dtype)
    return mixed, share * one_hot + (1 - share) * one_hot[partner]


def _span(length: int, remaining: float, generator: np.random.Generator) -> tuple[int, int]:
    middle, half = int(generator.integers(length)), int(length * (1 - remaining) ** 0.5) // 2
    return max(0, middle - half), min(length, middle + half)
