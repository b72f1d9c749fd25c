"""Activation memory of a forward pass, and the batch size that fits into a memory limit."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def max_batch_size(model: nn.Module, run: Callable[[Tensor], object], image: Tensor, memory: int) -> int:
    """Return how many images' forward passes fit into `memory` bytes, at least 1.

    Args:
        model: The model, whose parameters are not counted.
        run: The forward pass, called with `image`.
        image: One image, (1, ...).
        memory: Limit in bytes.
    """
    saved: dict[int, int] = {}  # bytes that autograd saves, by address
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def record(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            saved[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        run(image)
    return max(1, memory // max(1, sum(saved.values())))
