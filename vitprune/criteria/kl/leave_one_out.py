"""Leave-one-out KL importance (UP-ViTs): one forward pass per unit; the reference for the fast criteria."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.errors import BadInput
from vitprune.groups import REMOVED, Group, mask_without, shrink, zero
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.progress import track


@torch.no_grad()
def leave_one_out_kl(
    model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext
) -> Importance:
    """Score a unit by sum over images of KL(model || model without the unit), in nats, one unit removed at a time.

    Costs units x images forward passes. Residual channels, blocks and branches are shrunk, others zeroed, which gives
    the same function. A sub-layer is removed together with the next one; the last one scores infinity. If blocks are
    removed whole (`Group.whole_blocks`), the first unit has the score and the second scores infinity; the only block of
    a group scores infinity. If the logits are (B, positions, classes), divergences are summed over positions.

    Args:
        model: The model.
        groups: Groups of any kind but `weight`.
        batches: Calibration batches; labels are not used.
        context: Not used.

    Raises:
        BadInput: no batches.

    Source: UP-ViTs equation 1; pairs of sub-layers as in its block pruning.
    """
    if not batches:
        raise BadInput("kl: needs images; give calibration batches")
    device = next(model.parameters()).device
    images = [batch.to(device) for batch, _ in batches]
    units = [(group, unit) for group in groups for unit in _firsts(group)]
    scores = {group.name: torch.full((group.units,), torch.inf, dtype=torch.float64) for group in groups}
    with eval_mode(model):
        log_probs = [model(batch).double().log_softmax(-1) for batch in images]
        for group, unit in track(units, "removing one unit at a time"):
            scores[group.name][unit] = _divergence(copy_without_unit(model, group, unit), images, log_probs)
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def _firsts(group: Group) -> range:
    """Return the units to remove one after another; of two units removed together, the first."""
    if group.whole_blocks:
        return range(0, group.units if group.units > 2 else 0, 2)
    return range(group.num_candidates)


def copy_without_unit(model: nn.Module, group: Group, unit: int) -> nn.Module:
    """Return a copy of the model without one unit: residual channels, blocks and branches shrunk, others zeroed."""
    remove = shrink if group.kind in ("residual", *REMOVED) else zero
    return remove(copy.deepcopy(model), [group], {group.name: mask_without(group, unit)})


def _divergence(pruned: nn.Module, images: list[Tensor], log_probs: list[Tensor]) -> float:
    total = 0.0
    for batch, log_prob in zip(images, log_probs, strict=True):
        change = log_prob - pruned(batch).double().log_softmax(-1)  # (B, ..., classes)
        total += float((log_prob.exp() * change).sum())
    return total
