"""UP-ViTs' criterion: how far the model's answer moves, in nats, when one unit is removed."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoreConfig
from vitprune.errors import BadInput
from vitprune.groups import Group, mask_without, shrink, zero
from vitprune.runtime.eval_mode import evaluating
from vitprune.runtime.progress import track


@torch.no_grad()
def leave_one_out_kl(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a unit by sum over images of KL(model || model without it): remove one unit, run the model, repeat.

    The slow oracle that faster scorers are held against: units x images forward passes. Residual channels and blocks
    are shrunk away, the others zeroed, which is the same function. A sub-layer goes together with the next one; the
    last, which has none, scores infinity. Of a block that goes as a whole, the first unit has its score and the second
    scores infinity, as do both of the only one. Where the model answers at every position of a sequence, with logits
    (B, positions, classes), the divergences of all positions are summed.

    Source: UP-ViTs equation 1; for blocks, the pairs of its block pruning.
    """
    if not batches:
        raise BadInput("kl: needs images; give batches")
    device = next(model.parameters()).device
    images = [batch.to(device) for batch, _ in batches]
    units = [(group, unit) for group in groups for unit in _firsts(group)]
    scores = {group.name: torch.full((group.units,), torch.inf, dtype=torch.float64) for group in groups}
    with evaluating(model):
        answers = [model(batch).double().log_softmax(-1) for batch in images]
        for group, unit in track(units, "removing one unit at a time"):
            scores[group.name][unit] = _divergence(without(model, group, unit), images, answers)
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def _firsts(group: Group) -> range:
    """Units that are removed in turn; whatever goes with one of them is not among them."""
    if group.whole:
        return range(0, group.units if group.units > 2 else 0, 2)
    return range(group.candidates)


def without(model: nn.Module, group: Group, unit: int) -> nn.Module:
    """A copy of the model without one unit of a group: residual channels and blocks shrunk away, others zeroed."""
    remove = shrink if group.kind in ("residual", "block") else zero
    return remove(copy.deepcopy(model), [group], {group.name: mask_without(group, unit)})


def _divergence(pruned: nn.Module, images: list[Tensor], answers: list[Tensor]) -> float:
    total = 0.0
    for batch, answer in zip(images, answers, strict=True):
        change = answer - pruned(batch).double().log_softmax(-1)  # (B, ..., classes)
        total += float((answer.exp() * change).sum())
    return total
