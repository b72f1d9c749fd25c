"""Calibration images of some classes, labeled by their position among these classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitprune.data.batch_checks import IGNORED
from vitprune.errors import BadInput
from vitprune.runtime.kept_classes import class_positions

Batches = Sequence[tuple[Tensor, Tensor]]


def images_of_classes(batches: Batches, classes: Sequence[int] | None) -> Batches:
    """Return the calibration images of some classes, their labels as positions in `classes`.

    Images without a label are kept. Class probabilities are restricted to the classes and normalized.

    Args:
        batches: Calibration batches, their labels are classes of the dense model.
        classes: The classes (`prune.classes`); None for all.

    Raises:
        BadInput: there are batches, and no image of these classes; or labels are neither class indices nor
            probabilities of classes of which these are some.
    """
    if classes is None:
        return batches
    chosen = [_of_classes(images, labels, list(classes)) for images, labels in batches]
    kept = [(images, labels) for images, labels in chosen if len(images)]
    if batches and not kept:
        raise BadInput("prune.classes: no calibration image is of these classes; labels are classes of the dense model")
    return kept


def _of_classes(images: Tensor, labels: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    soft = labels.is_floating_point()
    if labels.dim() != 1 + soft or (soft and max(classes) >= labels.shape[1]):
        wanted = f"class indices (B,), or probabilities (B, classes) of more than {max(classes)} classes"
        raise BadInput(f"prune.classes: labels are {labels.dtype} of shape {tuple(labels.shape)}; give {wanted}")
    if soft:
        shares = labels[:, classes]
        total = shares.sum(dim=1, keepdim=True)
        present = total[:, 0] > 0
        return images[present], (shares / total)[present]
    positions = torch.where(labels == IGNORED, IGNORED, class_positions(labels, classes))
    return images[positions != -1], positions[positions != -1]
