"""Calibration images that the reconstruction holds out, and that no score or weight update may use."""

import torch
from torch import Tensor

from vitprune.config.reconstruct_config import ReconstructConfig
from vitprune.criteria import Batches
from vitprune.errors import BadInput


def fitted_images(batches: Batches, config: ReconstructConfig | None) -> Batches:
    """Return the batches without the images that a reconstruction holds out.

    Scores and weight updates use these images alone: the divergence on an image that an update was fitted to is too low
    for a comparison with later passes.

    Args:
        batches: Calibration batches.
        config: The settings of the reconstruction; None returns all images.

    Raises:
        BadInput: there are fewer images than `config.holdout`.
    """
    if config is None:
        return batches
    parts = torch.split(~held_out(batches, config), [len(images) for images, _ in batches])
    pairs = zip(batches, parts, strict=True)
    return [(images[part], labels[part]) for (images, labels), part in pairs if bool(part.any())]


def held_out(batches: Batches, config: ReconstructConfig) -> Tensor:
    """Return which images a reconstruction holds out, (images,).

    Raises:
        BadInput: there are fewer images than `config.holdout`.
    """
    number = sum(len(images) for images, _ in batches)
    if number < config.holdout:
        raise BadInput(f"prune.reconstruct: {number} images; give at least {config.holdout}, one is held out")
    return torch.arange(number) % config.holdout == config.holdout - 1
