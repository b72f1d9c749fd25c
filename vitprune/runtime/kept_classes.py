"""Classes that a model was cut to: its output i is class kept_classes(model)[i] of the dense model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.runtime.wrappers import is_timm_model, plain_model

CLASSES = "vitprune_classes"  # attribute of a model
SHOWN = 8  # classes in a message


def kept_classes(model: nn.Module) -> tuple[int, ...] | None:
    """Return the class of the dense model at every output; None if all are kept, or the classifier is another one."""
    plain = plain_model(model)
    classes: tuple[int, ...] | None = vars(plain).get(CLASSES)
    if classes is not None and is_timm_model(plain) and plain.num_classes != len(classes):
        return None  # after reset_classifier the outputs are no classes of the dense model
    return classes


def class_positions(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the position of every label in `classes`, -1 for labels of other classes.

    Shapes:
        labels and result (B,), int64.
    """
    equal = labels.unsqueeze(-1) == torch.tensor(list(classes), device=labels.device)
    return torch.where(equal.any(dim=-1), equal.int().argmax(dim=-1), -1)


def output_labels(model: nn.Module, labels: Tensor, where: str, ignored: int) -> Tensor:
    """Return labels as outputs of a model: of a model that was cut to some classes, their positions.

    Args:
        model: The model.
        labels: Classes of the dense model (B,), or probabilities of the outputs (B, outputs), which are returned.
        where: Name of the labels for messages.
        ignored: Label that is kept.

    Raises:
        BadInput: a label is not one of the classes that were kept.
    """
    classes = kept_classes(model)
    if classes is None or labels.is_floating_point():
        return labels
    positions = torch.where(labels == ignored, ignored, class_positions(labels, classes))
    if bool((positions == -1).any()):
        label = int(labels[positions == -1][0])
        raise BadInput(
            f"{where}: label {label} is not among the classes that the model was cut to ({listed_classes(classes)}); "
            "leave its images out"
        )
    return positions


def listed_classes(classes: Sequence[int]) -> str:
    """Return the first classes as text."""
    return ", ".join(map(str, classes[:SHOWN])) + (", ..." if len(classes) > SHOWN else "")
