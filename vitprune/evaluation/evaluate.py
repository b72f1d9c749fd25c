"""Evaluate a model: accuracy and cost."""

from collections.abc import Iterable
from dataclasses import asdict

from torch import Tensor, nn

from vitprune.data import example_input
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.runtime.wrappers import plain_model


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return top-1 and top-5 in percent, parameters and MACs of a model.

    Args:
        model: A timm model.
        batches: Batches (images (B, C, H, W), labels (B,)).

    Returns:
        top1, top5, and the fields of `Counts`.

    Raises:
        BadInput: as `accuracy`.
    """
    return accuracy(model, batches)[0] | asdict(count(model, example_input(plain_model(model), 1)))
