"""FastCAP: one Fisher matrix for all blocks of a layer, its masks from one look, its update from left to right."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoreConfig, Statistics, Update
from vitprune.criteria.obs.gradients import gradients, number_of
from vitprune.criteria.obs.weight_blocks import parts_of, portions
from vitprune.groups import Group, Masks, Scores

DAMP = 1e-2  # of the mean of the diagonal, as the paper's recipes have it


def fastcap(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by w_c^2 / U_cc^2, U the upper Cholesky factor of the inverse of its layer's matrix.

    U_cc^2 is the variance of column c given those before it: what is left to compensate when columns go from left to
    right. A column in which no block has a gradient costs nothing.

    Raises:
        BadInput: no batches, or a group that is not of single weights.

    Source: CAP, algorithm 2 (FastCAP), as the paper intends it; its released code never applies the result.
    """
    plain = replace(setting, pattern=None)
    statistics: Statistics = {}
    parts = parts_of(model, groups, plain.block)
    for portion in portions(parts, plain.memory, 2 * max((len(labels) for _, labels in batches), default=1)):
        for part, values in gradients(model, portion, batches, plain):
            rows = values.reshape(-1, part.size).double()
            found = 2 * (rows.mT @ rows).cpu() / number_of(batches, plain)
            name = f"{part.param}/fisher"
            statistics[name] = statistics[name] + found if name in statistics else found
    scores: Scores = {}
    for group in groups:
        upper = _upper(statistics[f"{group.slices[0].param}/fisher"])
        weights = _weights(model, group, len(upper))
        worth = (weights / upper.diagonal()).square() * _alive(statistics, group)
        scores[group.name] = worth.view(group.shape)
    return Importance(scores, compensating(model, groups, statistics), statistics=statistics)


def compensating(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """The update, for any masks: columns from left to right, each passing on what it has lost to those after it."""

    def update(masks: Masks) -> dict[str, Tensor]:
        return {g.slices[0].param: _passed_on(model, g, statistics, masks[g.name]) for g in groups if g.name in masks}

    return update


def _passed_on(model: nn.Module, group: Group, statistics: Statistics, mask: Tensor) -> Tensor:
    upper = _upper(statistics[f"{group.slices[0].param}/fisher"])
    weights = _weights(model, group, len(upper)).clone()
    keep = mask.cpu().view(weights.shape)
    for column in range(weights.shape[1]):
        lost = torch.where(keep[:, column], 0.0, weights[:, column]) / upper[column, column]
        weights[:, column:] -= lost[:, None] * upper[column, column:]
    return (weights * keep).view(group.shape)


def _upper(fisher: Tensor) -> Tensor:
    """Upper factor U of the damped inverse, U^T U = F^-1; columns without a gradient stand alone."""
    dead = fisher.diagonal() == 0
    whole = fisher + torch.diag(dead.double())
    whole.diagonal().add_(DAMP * float(fisher.diagonal()[~dead].mean() if not bool(dead.all()) else 1.0))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(whole)), upper=True)
    return upper


def _alive(statistics: Statistics, group: Group) -> Tensor:
    return statistics[f"{group.slices[0].param}/fisher"].diagonal() > 0


def _weights(model: nn.Module, group: Group, size: int) -> Tensor:
    return model.get_parameter(group.slices[0].param).detach().cpu().double().reshape(-1, size)
