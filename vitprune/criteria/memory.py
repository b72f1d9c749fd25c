"""Activation memory of a forward pass, and the batch size that fits into a memory limit."""

from collections.abc import Callable, Iterator

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
    return max(1, memory // activation_bytes(model, run, image))


def activation_bytes(model: nn.Module, run: Callable[[Tensor], object], image: Tensor) -> int:
    """Return the bytes that autograd saves in the forward pass of one image, parameters excluded."""
    saved: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def record(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            saved[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        run(image)
    return max(1, sum(saved.values()))


def minibatches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the images in order, `size` at a time."""
    return (images[start : start + size] for start in range(0, len(images), size))
