"""CutMix: a box of another image of the batch, and its share of the label."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F


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
