"""Logits of a model in evaluation mode."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.outputs import main_tensor


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return the logits of every batch, (B, ..., classes) each, on the device of the model.

    Args:
        model: The model.
        batches: Inputs (B, C, H, W) or tokens (B, T), on any device.
    """
    device = next(model.parameters()).device
    with eval_mode(model):
        return [main_tensor(model(images.to(device))) for images in batches]
