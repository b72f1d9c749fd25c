"""A teacher that is asked once for every image, where a training shows each image always alike."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.config.train_config import DistillConfig
from vitprune.runtime.distributed import ProcessGroup

AUTOCAST = {True: torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CachedTeacher(nn.Module):
    """Stands in a task of timm's for the teacher, and says what it is given to say."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None

    def normalize_input(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """The images as they are: nobody looks at them."""
        return images

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor | None:
        """The answers to the images of the batch that runs."""
        return self.given


class CachedDistillationTask(nn.Module):
    """A task of distillation whose batches bring the teacher's answers: images, labels, answers (B, ...)."""

    def __init__(self, task: Any):
        super().__init__()
        self.task, self._answers = task, CachedTeacher()
        task.teacher = self._answers

    @property
    def trainable_module(self) -> nn.Module:
        """What trains."""
        return self.task.trainable_module  # type: ignore[no-any-return]

    def get_eval_model(self) -> nn.Module:
        """The student."""
        return self.task.get_eval_model()  # type: ignore[no-any-return]

    def forward(self, images: Tensor, labels: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """The losses of a batch."""
        self._answers.given = answers
        return self.task(images, labels)  # type: ignore[no-any-return]


@torch.no_grad()
def cache_teacher(
    task: Any,
    settings: DistillConfig,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ProcessGroup,
) -> Tensor:
    """What the teacher of a task answers on all images, (N, classes) or (N, features), on the CPU, in their order.

    It runs in the precision of the training; each of several processes asks for its share of the batches.
    """
    device, found = next(task.trainable_module.parameters()).device, []
    task.to(device)
    amp = settings.train.amp if settings.train is not None else False
    for number, (images, _) in enumerate(batches):
        shown = images.to(device) if dist.owns(number) else images[:1].to(device)  # one tells the answers' shape
        with torch.autocast(device.type, AUTOCAST.get(amp), enabled=bool(amp)):
            seen = task.teacher.normalize_input(shown, task.student_mean, task.student_std)
            answers = task.teacher(seen, return_features=settings.kind == "features").cpu()
        found.append(answers if dist.owns(number) else answers.new_zeros((len(images), *answers.shape[1:])))
    answers = torch.cat(found)
    if dist.size > 1:  # a sum with zeros is exact
        answers = dist.all_reduce(answers.double()).to(answers.dtype)
    return answers


def with_teacher_outputs(
    batches: Iterable[tuple[Tensor, Tensor]], answers: Tensor, rows: Iterable[np.ndarray]
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of images and labels, each with the answers to its rows."""
    for (images, labels), own in zip(batches, rows, strict=True):
        yield images, labels, answers[torch.from_numpy(own)]
