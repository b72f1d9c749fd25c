"""Batches whose images and labels are mixed: CutMix as UP-ViTs has it, or timm's Mixup and CutMix in turns."""

from collections.abc import Callable

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from vitprune.data.cutmix import cutmix

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and labels -> images and shares of the classes


def mixer(mixup: float, cut: float, prob: float, classes: int, seed: int | np.random.Generator) -> Mix:
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
            return images, torch.nn.functional.one_hot(labels, classes).to(images.dtype)
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
