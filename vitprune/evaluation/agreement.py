"""Agreement of a pruned model with the dense model: cosine similarity and CKA of features, IoU of maps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.data.batch_checks import checked_stream
from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.outputs import main_tensor
from vitprune.runtime.progress import track


def cosine(features: Tensor, dense: Tensor) -> float:
    """Return the mean cosine similarity of features (N, C) of the same images.

    Raises:
        BadInput: the features differ in width.
    """
    if features.shape != dense.shape:
        channels = f"{features.shape[1]} channels, those of the dense model {dense.shape[1]}"
        raise BadInput(f"cosine: the features have {channels}; use cka")
    return float(F.cosine_similarity(features.double(), dense.double(), dim=1).mean())


def linear_cka(features: Tensor, dense: Tensor) -> float:
    """Return the linear centered kernel alignment of features (N, C) and (N, D) of the same images, between 0 and 1.

    Raises:
        BadInput: the features of all images are equal.

    Source: Kornblith et al. 2019: |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms of centered features.
    """
    x, y = (value.double() - value.double().mean(dim=0) for value in (features, dense))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    if not float(norms):
        raise BadInput("cka: the features of all images are equal; give several different images")
    return float((y.T @ x).square().sum() / norms)


@torch.no_grad()
def map_iou(model: nn.Module, dense: nn.Module, batches: Iterable[Any], threshold: float = 0.0) -> float:
    """Return the mean intersection over union of two models' maps, over the images.

    A map of one channel, (B, 1, H, W) or (B, H, W), is positive above the threshold; an image on which both maps have
    no positive position is left out. Of several channels, every position has the class of its largest one, and the IoU
    is the mean over the classes that occur in either map.

    Args:
        model: The pruned model.
        dense: The dense model.
        batches: Batches of images (B, C, H, W), with or without labels.
        threshold: Threshold of the output; 0 is the probability 0.5 of a logit.

    Raises:
        BadInput: the outputs are no maps of the same shape, or no image has a positive position.
    """
    device, values = next(model.parameters()).device, list[Tensor]()
    with eval_mode(model), eval_mode(dense):
        for images, _ in checked_stream(track(batches, "evaluating"), model, "batches", labeled=False, mapped=False):
            first, second = (main_tensor(network(images.to(device))) for network in (model, dense))
            values += _overlaps(_positive(first, threshold), _positive(second, threshold))
    if not values:
        raise BadInput(f"iou: no image has an output above the threshold {threshold:g}; give another threshold")
    return float(torch.stack(values).mean())


def _positive(output: Any, threshold: float) -> Tensor:
    """Return one mask per class, (B, classes, positions)."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadInput(f"iou: the output is no map (B, C, H, W) but {shape}; use cosine or cka")
    if output.dim() == 3 or output.shape[1] == 1:
        return (output > threshold).flatten(1).unsqueeze(1)
    classes = torch.arange(output.shape[1], device=output.device)
    return (output.argmax(dim=1, keepdim=True) == classes[:, None, None]).flatten(2)


def _overlaps(first: Tensor, second: Tensor) -> list[Tensor]:
    if first.shape != second.shape:
        raise BadInput(f"iou: the maps have shapes {tuple(first.shape)} and {tuple(second.shape)}; use the same model")
    both, either = (first & second).sum(dim=2).double(), (first | second).sum(dim=2)
    shares, present = both / either.clamp_min(1), either > 0
    return [row[chosen].mean().cpu() for row, chosen in zip(shares, present, strict=True) if bool(chosen.any())]
