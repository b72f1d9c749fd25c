"""Training tasks: cross-entropy, logit distillation and feature distillation."""

from functools import partial
from typing import Any

import torch
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from torch import nn

from vitprune.config.train_config import DistillConfig
from vitprune.errors import BadInput
from vitprune.evaluation.losses import cross_entropy


def classification(model: nn.Module, smoothing: float = 0.0) -> nn.Module:
    """Return the task of cross-entropy on labels with label smoothing."""
    task: nn.Module = ClassificationTask(model, partial(cross_entropy, smoothing=smoothing), verbose=False)
    return task


def logit_distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, temperature: float, smoothing: float
) -> nn.Module:
    """Return the task of cross-entropy + alpha * KL(teacher || student) on logits divided by the temperature.

    The divergence is averaged over the batch and, for sequences, summed over positions.

    Args:
        student: The model to train.
        teacher: The teacher; it is set to evaluation mode and takes no gradient.
        alpha: Weight of the divergence.
        temperature: Divisor of both models' logits.
        smoothing: Label smoothing of the cross-entropy.

    Returns:
        A task of timm.

    Raises:
        BadInput: the models have different numbers of classes.

    Source: UP-ViTs, equation 2.
    """
    classes, taught = (vars(model).get("num_classes") for model in (student, teacher))
    if classes != taught:
        raise BadInput(f"teacher: has {taught} classes, the model has {classes}; give the dense model, or use features")
    arguments = _distillation_arguments(student, teacher, alpha, smoothing)
    task: nn.Module = LogitDistillationTask(**arguments, temperature=temperature)
    return task


def feature_distillation(
    student: nn.Module, teacher: nn.Module, alpha: float, smoothing: float, seed: int
) -> nn.Module:
    """Return the task of cross-entropy + alpha * mean squared error of the pooled features before the head.

    If the student has fewer features, a trained Linear layer maps them to the teacher's number of features.

    Args:
        student: The model to train.
        teacher: The teacher; it is set to evaluation mode and takes no gradient.
        alpha: Weight of the squared error.
        smoothing: Label smoothing of the cross-entropy.
        seed: Seed of the Linear layer's weights.

    Returns:
        A task of timm.

    Source: variant for PVTv2 (alpha 20) that other papers attribute to UP-ViTs; the UP-ViTs paper does not give it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        arguments = _distillation_arguments(student, teacher, alpha, smoothing)
        task: nn.Module = FeatureDistillationTask(**arguments, dtype=next(student.parameters()).dtype)
    return task


def _distillation_arguments(student: nn.Module, teacher: nn.Module, alpha: float, smoothing: float) -> dict[str, Any]:
    """Arguments that timm's two distillation tasks share."""
    return {
        "student_model": student, "teacher_model": teacher.eval().requires_grad_(False), "verbose": False,
        "criterion": partial(cross_entropy, smoothing=smoothing), "distill_loss_weight": alpha, "task_loss_weight": 1.0,
    }  # fmt: skip


def distillation_task(
    student: nn.Module, teacher: nn.Module, settings: DistillConfig, smoothing: float, seed: int
) -> nn.Module:
    """Return the distillation task of the settings: of features or of logits.

    Args:
        student: The model to train.
        teacher: The teacher.
        settings: Kind, weight and temperature of the distillation.
        smoothing: Label smoothing of the cross-entropy.
        seed: Seed of an additional layer.
    """
    if settings.kind == "features":
        return feature_distillation(student, teacher, settings.alpha, smoothing, seed)
    return logit_distillation(student, teacher, settings.alpha, settings.temperature, smoothing)
