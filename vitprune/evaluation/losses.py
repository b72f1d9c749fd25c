"""Cross-entropy and KL divergence for logits per image or per position of a sequence."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitprune.data.batch_checks import IGNORED
from vitprune.errors import BadInput
from vitprune.runtime.outputs import require_classifier


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats.

    Args:
        logits: (..., classes).
        labels: Class indices (...), or class probabilities (..., classes).
        smoothing: Label smoothing.

    Raises:
        BadInput: labels of another shape.
    """
    _check_shape(labels, logits)
    targets = labels.flatten(0, -2) if labels.is_floating_point() else labels.flatten()
    return F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=smoothing)


def kl_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the KL divergence of logits from the expected ones, in nats per image."""
    log_q, log_p = logits.log_softmax(dim=-1), expected.log_softmax(dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def labeled_loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Return `cross_entropy` of a model's logits after a check of the labels.

    Raises:
        BadInput: the model has no classifier, or a label is not a class; positions of a sequence may be ignored, but
            not all of them.
    """
    require_classifier(model, "give it one, or use a method without labels, such as unit-obs or obc")
    check_labels(labels, logits)
    return cross_entropy(logits, labels)


def loss_at(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return `labeled_loss` of a model with other weights.

    Args:
        model: The model.
        weights: Tensors by parameter name; other parameters keep their values.
        images: Inputs of the model.
        labels: Their labels.

    Raises:
        BadInput: as `labeled_loss`.
    """
    modules, names = list(model.modules()), [path for path, _ in model.named_modules(remove_duplicate=False)]
    tied = len(modules) == len(names)  # torch cannot tie the weights of a module that occurs twice, and need not
    return labeled_loss(model, functional_call(model, dict(weights), images, tie_weights=tied), labels)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Check that labels are classes of the logits, or probabilities of the classes.

    Raises:
        BadInput: they are not.
    """
    _check_shape(labels, logits)
    if labels.is_floating_point():
        return
    classes = logits.shape[-1]
    used = labels[labels != IGNORED] if logits.dim() > 2 else labels
    wrong = used[(used < 0) | (used >= classes)]
    if len(wrong) or not len(used):
        label = int(wrong[0]) if len(wrong) else IGNORED
        missing = ", and this image has no label" if label == IGNORED else ""
        if bool((labels == IGNORED).all()):
            raise BadInput(
                f"labels: these images have no label ({IGNORED}); give pairs (images, labels), with the classes 0 to "
                f"{classes - 1}, or choose a method that needs no labels (vitprune methods)"
            )
        raise BadInput(f"labels: {label} is not a class; the model has the classes 0 to {classes - 1}{missing}")


def _check_shape(labels: Tensor, logits: Tensor) -> None:
    wanted = logits.shape if labels.is_floating_point() else logits.shape[:-1]
    if labels.is_floating_point() and labels.shape == logits.shape[:-1]:
        raise BadInput(f"labels: are {labels.dtype}; give class indices as integers")
    if labels.shape != wanted:
        raise BadInput(f"labels: have shape {tuple(labels.shape)}; {tuple(wanted)} is needed for these images")
