"""Cached teacher outputs for distillation without augmentation: one teacher pass per image."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.config.train_config import DistillConfig
from vitprune.runtime.distributed import ProcessGroup

AUTOCAST = {True: torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CachedTeacher(nn.Module):
    """Replacement for the teacher of a timm task that returns precomputed outputs.

    Attributes:
        outputs: Teacher outputs (B, ...) of the current batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: Tensor | None = None

    def normalize_input(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return the images unchanged: they are not used."""
        return images

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor | None:
        """Return the outputs of the current batch."""
        return self.outputs


class CachedDistillationTask(nn.Module):
    """Distillation task whose batches include the teacher's outputs.

    Args:
        task: A distillation task of timm; its teacher is replaced.
    """

    def __init__(self, task: Any):
        super().__init__()
        self.task, self._teacher = task, CachedTeacher()
        task.teacher = self._teacher

    @property
    def trainable_module(self) -> nn.Module:
        """The module whose parameters are trained."""
        return self.task.trainable_module  # type: ignore[no-any-return]

    def get_eval_model(self) -> nn.Module:
        """Return the student."""
        return self.task.get_eval_model()  # type: ignore[no-any-return]

    def forward(self, images: Tensor, labels: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        """Return the losses of a batch: images (B, C, H, W), labels (B,), teacher outputs (B, ...)."""
        self._teacher.outputs = outputs
        return self.task(images, labels)  # type: ignore[no-any-return]


@torch.no_grad()
def cache_teacher(
    task: Any, settings: DistillConfig, batches: Iterable[tuple[Tensor, Tensor]], dist: ProcessGroup
) -> Tensor:
    """Compute the teacher's outputs of all images, in the precision of the training.

    Args:
        task: The distillation task.
        settings: Distillation settings: logits or features, and the precision.
        batches: All images in order.
        dist: Process group; each rank computes its share of the batches.

    Returns:
        Outputs (N, classes) or (N, features) on the CPU, in the order of the images, on every rank.
    """
    device, parts = next(task.trainable_module.parameters()).device, []
    task.to(device)
    amp = settings.train.amp if settings.train is not None else False
    for number, (images, _) in enumerate(batches):
        # the batches of other ranks: one image gives the shape of the outputs
        local = images.to(device) if dist.owns(number) else images[:1].to(device)
        with torch.autocast(device.type, AUTOCAST.get(amp), enabled=bool(amp)):
            normalized = task.teacher.normalize_input(local, task.student_mean, task.student_std)
            outputs = task.teacher(normalized, return_features=settings.kind == "features").cpu()
        parts.append(outputs if dist.owns(number) else outputs.new_zeros((len(images), *outputs.shape[1:])))
    outputs = torch.cat(parts)
    if dist.size > 1:  # a sum with zeros is exact
        outputs = dist.all_reduce(outputs.double()).to(outputs.dtype)
    return outputs


def with_teacher_outputs(
    batches: Iterable[tuple[Tensor, Tensor]], outputs: Tensor, rows: Iterable[np.ndarray]
) -> Iterator[tuple[Tensor, ...]]:
    """Add the teacher's outputs to batches of images and labels.

    Args:
        batches: Images (B, C, H, W) and labels (B,).
        outputs: Teacher outputs of all images, (N, ...).
        rows: Rows of `outputs` for each batch, (B,) int64.

    Yields:
        Images, labels and outputs of a batch.
    """
    for (images, labels), indices in zip(batches, rows, strict=True):
        yield images, labels, outputs[torch.from_numpy(indices)]
