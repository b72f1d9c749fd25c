"""Second-order KL importance (UP-ViTs) of all units from a few backward passes per image."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.kl.gate_gradients import UnitGate, find_gates, record_gates
from vitprune.criteria.memory import max_batch_size
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.progress import track


def fisher_kl(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a unit by 1/2 sum over images and classes of p_c (d log p_c / dg)^2, with g a gate on the unit.

    This is the second-order expansion of KL(model || model without the unit) in g. The sum over classes is estimated
    from `fisher_directions` gradients per image (see that module); it is exact if they are at least the classes.

    Args:
        model: The model.
        groups: Groups of any kind but `weight`.
        batches: Calibration batches; labels are not used.
        context: The scoring options.

    Raises:
        BadInput: no batches, or a module through which the gate gradient is not defined.

    Source: UP-ViTs equation 1, expanded; Fisher information of gates as in Theis et al. 2018.
    """
    if not batches:
        raise BadInput("kl-fisher: needs images; give calibration batches")
    scores = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    first = context.first
    for images, _ in track(batches, "taking gradients"):
        positions = range(first, first + len(images))
        for name, value in fisher_kl_per_image(model, groups, images, context, positions).items():
            scores[name] += value.sum(dim=1)
        first += len(images)
    for group in groups:
        scores[group.name][group.num_candidates :] = torch.inf  # the last sub-layer has no successor to be removed with
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def fisher_kl_per_image(
    model: nn.Module,
    groups: Sequence[Group],
    images: Tensor,
    context: ScoringContext,
    positions: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Return the score of every unit on every image.

    Args:
        model: The model.
        groups: Groups of any kind but `weight`.
        images: (B, C, H, W).
        context: The scoring options.
        positions: Index of every image in the data set, which decides its random signs; default: from 0.

    Returns:
        Group name -> (units, B), float64, on the CPU.
    """
    gates = find_gates(model, groups)
    device = next(model.parameters()).device
    images = images.detach().to(device)
    with eval_mode(model), frozen(model), torch.enable_grad():
        with record_gates(model, gates, 1):
            run = partial(_forward, model, context=context)
            size = max_batch_size(model, run, images[:1], context.config.memory)
        indices = range(len(images)) if positions is None else positions
        starts = range(0, len(images), size)
        pieces = [_minibatch_scores(model, gates, images[n : n + size], context, indices[n : n + size]) for n in starts]
    return {group.name: torch.cat([piece[group.name] for piece in pieces], dim=1) for group in groups}


def _minibatch_scores(
    model: nn.Module, gates: Sequence[UnitGate], images: Tensor, context: ScoringContext, positions: Sequence[int]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    with record_gates(model, gates, len(images)) as tape:
        logits = _forward(model, images, context)
        probability = logits.detach().double().softmax(dim=-1)  # (B, ..., classes)
        head, number = tape.head(logits), context.config.directions()
        for direction in fisher_directions(probability, head, number, context.seed, positions):
            for name, grad in tape.derivatives(logits, direction.to(logits.dtype), gates).items():
                half = grad.double().square() / 2  # (B, units)
                total[name] = total[name] + half if name in total else half
    return {name: value.T.cpu() for name, value in total.items()}


def _forward(model: nn.Module, images: Tensor, context: ScoringContext) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=context.config.autocast):
        logits: Tensor = model(images)
    return logits
