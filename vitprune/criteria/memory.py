"""What a forward pass keeps for its backward passes, so that as many images run together as memory allows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def images_at_once(model: nn.Module, run: Callable[[Tensor], object], image: Tensor, memory: int) -> int:
    """How many images' forward passes fit into so many bytes, from what that of one (1, ...) keeps; at least 1."""
    return max(1, memory // activation_bytes(model, run, image))


def activation_bytes(model: nn.Module, run: Callable[[Tensor], object], image: Tensor) -> int:
    """Bytes that the forward pass of one image keeps for its backward passes, the weights not counted."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(image)
    return max(1, sum(kept.values()))


def minibatches(images: Tensor, size: int) -> Iterator[Tensor]:
    """The images in order, so many at a time."""
    return (images[start : start + size] for start in range(0, len(images), size))
