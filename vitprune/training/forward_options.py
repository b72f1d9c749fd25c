"""Forward options during training: channels_last, gradient checkpointing, fake quantization."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.config.train_config import TrainConfig
from vitprune.errors import BadInput
from vitprune.training.quantization_aware import FakeQuant


@contextmanager
def forward_options(task: Any, recipe: TrainConfig) -> Iterator[None]:
    """Apply the forward options of a recipe to a task, and undo them at the end. Weights do not change.

    Raises:
        BadInput: the model does not support gradient checkpointing.
    """
    model = task.get_eval_model()
    if recipe.checkpointing:
        _set_grad_checkpointing(model, True)
    if recipe.channels_last:
        task.to(memory_format=torch.channels_last)
    try:
        with FakeQuant() if recipe.int8 else nullcontext():
            yield
    finally:
        if recipe.channels_last:
            task.to(memory_format=torch.contiguous_format)
        if recipe.checkpointing:
            _set_grad_checkpointing(model, False)


def _set_grad_checkpointing(model: nn.Module, on: bool) -> None:
    if on and without_merging(model) is not model:
        raise BadInput("train.checkpointing: not supported with merged tokens; set it to false")
    switch = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise NotImplementedError
        switch(on)
    except (AssertionError, NotImplementedError):  # timm asserts that the model supports it
        name = type(model).__name__
        raise BadInput(f"train.checkpointing: not supported by {name}; set it to false") from None


def to_device(images: Tensor, device: torch.device, recipe: TrainConfig) -> Tensor:
    """Move images (B, C, H, W) or tokens to a device, in the memory format of the recipe."""
    if recipe.channels_last and images.dim() == 4:
        return images.to(device, memory_format=torch.channels_last)
    return images.to(device)
