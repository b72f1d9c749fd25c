"""Rotation of the residual stream before the first pruning cycle, as the plan says."""

import torch
from torch import nn

from vitprune.criteria import Batches
from vitprune.criteria.obs.stream import rotated, stream_basis
from vitprune.pruning.held_out import fitted_images
from vitprune.pruning.plan import Plan
from vitprune.runtime.eval_mode import scoring_mode


def rotate_if_planned(model: nn.Module, plan: Plan, batches: Batches) -> nn.Module:
    """Return the model with its residual stream rotated if the plan says so, else the model itself.

    Raises:
        BadInput: no batches, or the stream cannot be rotated.
    """
    if not plan.config.rotate_residual:
        return model
    with scoring_mode(model):
        basis = stream_basis(model, fitted_images(batches, plan.config.reconstruct), plan.context(0))
    with torch.inference_mode(False):
        return rotated(model, basis, batches[0][0][:1])
