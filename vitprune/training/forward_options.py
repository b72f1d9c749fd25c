"""What a recipe changes of a model's passes for the time of a training: memory format, blocks computed again, INT8."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.config.train_config import TrainConfig
from vitprune.errors import BadInput
from vitprune.training.quantization_aware import FakeQuant


@contextmanager
def forward_options(task: Any, recipe: TrainConfig) -> Iterator[None]:
    """Have the task's passes run as the recipe asks, and as before afterwards; no weight changes.

    Raises:
        BadInput: the model cannot compute its blocks again.
    """
    model = task.get_eval_model()
    if recipe.checkpointing:
        _again(model, True)
    if recipe.channels_last:
        task.to(memory_format=torch.channels_last)
    try:
        with FakeQuant() if recipe.int8 else nullcontext():
            yield
    finally:
        if recipe.channels_last:
            task.to(memory_format=torch.contiguous_format)
        if recipe.checkpointing:
            _again(model, False)


def _again(model: nn.Module, on: bool) -> None:
    switch = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise NotImplementedError
        switch(on)
    except (AssertionError, NotImplementedError):  # timm's models that cannot say so by an assertion
        name = type(model).__name__
        raise BadInput(f"train.checkpointing: {name} cannot compute its blocks again; set it to false") from None


def to_device(images: Tensor, device: torch.device, recipe: TrainConfig) -> Tensor:
    """Images (B, C, H, W), or tokens, where and as the passes take them."""
    if recipe.channels_last and images.dim() == 4:
        return images.to(device, memory_format=torch.channels_last)
    return images.to(device)
