"""The loss on labels, for one answer per image or one per position of a sequence."""

from torch import Tensor, nn
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (..., classes) on labels (...), or on shares of classes (..., classes), in nats."""
    targets = labels.flatten(0, -2) if labels.is_floating_point() else labels.flatten()
    return F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=smoothing)


class CrossEntropy(nn.Module):
    """The same as a module, as timm's tasks take it."""

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over all answers."""
        return cross_entropy(logits, labels, self.smoothing)
