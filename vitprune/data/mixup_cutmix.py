"""Batches whose images and labels are mixed: CutMix as UP-ViTs has it, or timm's Mixup and CutMix in turns."""

from collections.abc import Callable

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F

MixFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and labels -> images and shares of the classes


def make_mixer(mixup: float, cut: float, prob: float, classes: int, seed: int | np.random.Generator) -> MixFn:
    """What mixes the batches of a training, each call the next of a seeded series; Beta parameters, 0 for without.

    Without Mixup it is `cutmix`, else timm's Mixup, which draws one of the two for each batch where both are asked for;
    it pairs the images of a batch from both ends, and an odd one in the middle is its own partner. Labels (B,) become
    shares (B, classes), of which none is smoothed.

    Source: Zhang et al. 2018 (Mixup), Yun et al. 2019 (CutMix), DeiT's training for the two in turns.
    """
    generator = np.random.default_rng(seed)
    mixing = Mixup(mixup, cut, prob=prob, label_smoothing=0.0, num_classes=classes) if mixup else None

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if mixing is not None:
            return _seeded(mixing, images, labels, int(generator.integers(2**32)))
        if prob < 1 and generator.random() >= prob:
            return images, F.one_hot(labels, classes).to(images.dtype)
        return cutmix(images, labels, classes, cut, generator)

    return mix


def _seeded(mixing: Mixup, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """timm draws from NumPy's global generator: seed it, and put it back after."""
    middle, odd, state = len(images) // 2, len(images) % 2, np.random.get_state()
    np.random.seed(seed)
    try:  # an odd batch has its middle twice, so that both ends have a partner, and then once again
        both = (torch.cat([given[: middle + odd], given[middle:]]) for given in (images, labels))
        mixed = mixing(*both)
    finally:
        np.random.set_state(state)
    pictures, shares = (torch.cat([found[: middle + odd], found[middle + 2 * odd :]]) for found in mixed)
    return pictures, shares.to(images.dtype)


def cutmix(
    images: Tensor, labels: Tensor, classes: int, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Paste one box of a shuffled batch (B, C, H, W) into the batch; labels (B,) become shares (B, classes).

    The share that stays is drawn from Beta(alpha, alpha) or is the rest of it, whichever is larger; the box lies around
    a uniform point, and what of it is outside the image is cut off and does not count.

    Source: Yun et al. 2019, algorithm 1; the larger share as in UP-ViTs' fine-tuning.
    """
    height, width = images.shape[-2:]
    drawn = generator.beta(alpha, alpha)
    stays = max(drawn, 1 - drawn)
    partner = generator.permutation(len(images))
    top, bottom = _span(height, stays, generator)
    left, right = _span(width, stays, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    whole = F.one_hot(labels, classes).to(images.dtype)
    return mixed, share * whole + (1 - share) * whole[partner]


def _span(length: int, stays: float, generator: np.random.Generator) -> tuple[int, int]:
    middle, half = int(generator.integers(length)), int(length * (1 - stays) ** 0.5) // 2
    return max(0, middle - half), min(length, middle + half)
