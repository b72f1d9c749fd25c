"""FastCAP: one Fisher matrix shared by all blocks of a layer, one-shot masks, column-wise update."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext, Statistics, Update
from vitprune.criteria.obs.gradients import count_gradients, weight_gradients
from vitprune.criteria.obs.weight_blocks import chunk_by_memory, split_into_blocks
from vitprune.groups import Group, Masks, Scores

DAMP = 1e-2  # of the mean of the diagonal, as in the paper's recipes


def fastcap(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by w_c^2 / U_cc^2, with U the upper Cholesky factor of the inverse of its layer's Fisher matrix.

    U_cc^2 is the variance of column c conditioned on the columns before it. Columns without any gradient score 0.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        batches: Labeled calibration batches.
        context: The scoring options.

    Raises:
        BadInput: no batches, or a group of another kind.

    Source: CAP, algorithm 2 (FastCAP), as described in the paper; its released code does not apply the result.
    """
    context = replace(context, pattern=None)
    statistics: Statistics = {}
    parts = split_into_blocks(model, groups, context.config.fisher_block_size)
    gradients = 2 * max((len(labels) for _, labels in batches), default=1)
    for chunk in chunk_by_memory(parts, context.config.memory, gradients):
        for part, values in weight_gradients(model, chunk, batches, context):
            rows = values.reshape(-1, part.size).double()
            moment = 2 * (rows.mT @ rows).cpu() / count_gradients(batches, context)
            name = f"{part.param}/fisher"
            statistics[name] = statistics[name] + moment if name in statistics else moment
    scores: Scores = {}
    for group in groups:
        upper = _upper(statistics[f"{group.slices[0].param}/fisher"])
        weights = _weights(model, group, len(upper))
        importance = (weights / upper.diagonal()).square() * _has_gradient(statistics, group)
        scores[group.name] = importance.view(group.shape)
    return Importance(scores, columnwise_update(model, groups, statistics), statistics=statistics)


def columnwise_update(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """Return the update that removes columns from left to right and compensates in the columns after each."""

    def update(masks: Masks) -> dict[str, Tensor]:
        return {
            g.slices[0].param: _update_columns(model, g, statistics, masks[g.name]) for g in groups if g.name in masks
        }

    return update


def _update_columns(model: nn.Module, group: Group, statistics: Statistics, mask: Tensor) -> Tensor:
    upper = _upper(statistics[f"{group.slices[0].param}/fisher"])
    weights = _weights(model, group, len(upper)).clone()
    keep = mask.cpu().view(weights.shape)
    for column in range(weights.shape[1]):
        error = torch.where(keep[:, column], 0.0, weights[:, column]) / upper[column, column]
        weights[:, column:] -= error[:, None] * upper[column, column:]
    return (weights * keep).view(group.shape)


def _upper(fisher: Tensor) -> Tensor:
    """Return U with U^T U = F^-1 for the damped F; columns without gradients are decoupled."""
    no_gradient = fisher.diagonal() == 0
    damped = fisher + torch.diag(no_gradient.double())
    damped.diagonal().add_(DAMP * float(fisher.diagonal()[~no_gradient].mean() if not bool(no_gradient.all()) else 1.0))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return upper


def _has_gradient(statistics: Statistics, group: Group) -> Tensor:
    return statistics[f"{group.slices[0].param}/fisher"].diagonal() > 0


def _weights(model: nn.Module, group: Group, size: int) -> Tensor:
    return model.get_parameter(group.slices[0].param).detach().cpu().double().reshape(-1, size)
