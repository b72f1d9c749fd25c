"""Training tasks: cross-entropy, logit distillation and feature distillation."""

from typing import Any

import torch
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from torch import nn

from vitprune.config.train_config import DistillConfig
from vitprune.evaluation.losses import CrossEntropy


def classification(model: nn.Module, smoothing: float = 0.0) -> nn.Module:
    """The task of cross-entropy on labels."""
    task: nn.Module = ClassificationTask(model, CrossEntropy(smoothing), verbose=False)
    return task


def logit_distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, temperature: float, smoothing: float
) -> nn.Module:
    """The task of cross-entropy + alpha * KL(teacher || student) on softened logits.

    The divergence is summed over the positions of a sequence, if there are any, and averaged over the batch.

    Source: UP-ViTs equation 2.
    """
    task: nn.Module = LogitDistillationTask(**_taught(student, teacher, alpha, smoothing), temperature=temperature)
    return task


def feature_distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, smoothing: float, seed: int
) -> nn.Module:
    """The task of cross-entropy + alpha * mean squared error of the features before the head, pooled over positions.

    Where the student's features are fewer, a Linear layer drawn from the seed and trained with it maps them.

    Source: UP-ViTs' variant for PVTv2, as described by others (alpha 20); the letter itself does not give it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = _taught(student, teacher, alpha, smoothing)
        task: nn.Module = FeatureDistillationTask(**own, dtype=next(student.parameters()).dtype)
    return task


def _taught(student: nn.Module, teacher: nn.Module, alpha: float, smoothing: float) -> dict[str, Any]:
    """What both tasks take: who learns from whom, and how much labels and teacher count."""
    return {
        "student_model": student, "teacher_model": teacher.eval().requires_grad_(False), "verbose": False,
        "criterion": CrossEntropy(smoothing), "distill_loss_weight": alpha, "task_loss_weight": 1.0,
    }  # fmt: skip


def distillation_task(
    student: nn.Module, teacher: nn.Module, settings: DistillConfig, smoothing: float, seed: int
) -> nn.Module:
    """The task that the settings ask for."""
    if settings.kind == "features":
        return feature_distillation(student, teacher, settings.alpha, smoothing, seed)
    return logit_distillation(student, teacher, settings.alpha, settings.temperature, smoothing)
