"""Cross-entropy for logits per image or per position of a sequence."""

from torch import Tensor, nn
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats.

    Args:
        logits: (..., classes).
        labels: class indices (...), or class probabilities (..., classes).
        smoothing: label smoothing.
    """
    targets = labels.flatten(0, -2) if labels.is_floating_point() else labels.flatten()
    return F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=smoothing)


class CrossEntropy(nn.Module):
    """`cross_entropy` as a module, for timm's distillation tasks."""

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over all outputs."""
        return cross_entropy(logits, labels, self.smoothing)
