"""First-order Taylor importance: the squared change of the loss when a unit is removed."""

from collections.abc import Sequence

import torch
from torch import nn

from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.criteria.magnitude import parameters_of
from vitprune.errors import BadInput
from vitprune.evaluation.losses import loss_at
from vitprune.groups import Group, unit_sums
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.progress import track


def taylor(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a unit by sum over batches of (sum over its weights of dL/dw * w)^2, with the cross-entropy loss L.

    Args:
        model: The model; its parameters may be frozen.
        groups: Groups of any kind but `block`.
        batches: Labeled batches.
        context: Not used.

    Raises:
        BadInput: no batches, or a group of blocks.

    Source: Molchanov et al. 2019, equation 8.
    """
    if not batches:
        raise BadInput("taylor: needs images with labels; give calibration batches")
    named = {name: weight.detach().requires_grad_() for name, weight in parameters_of(model, groups).items()}
    device = next(model.parameters()).device
    scores = {group.name: torch.zeros(group.shape, dtype=torch.float64) for group in groups}
    for images, labels in track(batches, "taking gradients"):
        with eval_mode(model), torch.enable_grad():
            loss = loss_at(model, named, images.to(device), labels.to(device))
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)  # 0 of an unused weight
        products = {name: g * w.detach() for (name, w), g in zip(named.items(), gradients, strict=True)}
        for group in groups:
            scores[group.name] += unit_sums(group, products).square()
    return Importance(scores)
