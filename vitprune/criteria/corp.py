"""CORP: rank FFN units by energy and weight norms, then predict removed units affinely from the kept ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext, Statistics, Update
from vitprune.criteria.moments import collect_unit_moments, find_consumer
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores, unit_sums

RIDGE = 1e-3  # absolute; the authors' rule gives this value in every layer of a small model


def corp(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score FFN units by E[x_j^2] ||W1_j|| ||W2_j||, with an affine-prediction update of the consumer.

    Args:
        model: The dense model.
        groups: Groups of kind `ffn`.
        batches: Calibration batches (images, labels).
        context: The scoring options.

    Returns:
        Scores of every unit, the update and the second moments that it needs.

    Raises:
        BadInput: no batches, or a group of another kind.

    Source: CORP (arXiv 2602.05243): ranking by energy and weights on the dense model. Its separate pruning of q and k
        is not implemented; `unit_obs` scores kind `qk`.
    """
    for group in groups:
        if group.kind != "ffn":
            raise BadInput(f"{group.name}: corp scores ffn, not kind {group.kind!r}; set prune.kinds to [ffn]")
    statistics = collect_unit_moments(model, groups, batches, context)
    scores: Scores = {}
    for group in groups:
        moments = statistics[f"{find_consumer(model, group).path}/inputs"].sum(dim=0)
        energy = moments.diagonal()[:-1] / moments[-1, -1]
        scores[group.name] = energy.view(group.shape) * _norms(model, group)
    return Importance(scores, affine_update(model, groups, statistics), statistics=statistics)


def affine_update(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """Return the update that folds the affine prediction of removed units into the consumer's weight and bias.

    W_kept += W_removed B and b += W_removed c, where x_removed ~ B x_kept + c (see `affine_prediction`).
    """

    def update(masks: Masks) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for group in (group for group in groups if group.name in masks and not bool(masks[group.name].all())):
            path, mask = find_consumer(model, group).path, masks[group.name].flatten()
            layer = dict(model.get_submodule(path).named_parameters())
            weight = layer["weight"].detach().cpu().double()  # (o, k)
            coefficients, constant = affine_prediction(statistics[f"{path}/inputs"].sum(dim=0), mask)
            result[f"{path}.weight"] = weight.clone()
            result[f"{path}.weight"][:, mask] += weight[:, ~mask] @ coefficients
            if "bias" in layer:
                result[f"{path}.bias"] = layer["bias"].detach().cpu() + weight[:, ~mask] @ constant
        return result

    return update


def affine_prediction(moments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the removed inputs as an affine function of the kept ones by ridge regression.

    Args:
        moments: Second moment of the inputs with a 1 appended, (k+1, k+1).
        mask: (k,) booleans, True keeps an input.

    Returns:
        Coefficients (removed, kept) and constants (removed,).
    """
    mean = moments[:-1, -1] / moments[-1, -1]
    covariance = moments[:-1, :-1] / moments[-1, -1] - torch.outer(mean, mean)
    kept = covariance[mask][:, mask] + RIDGE * torch.eye(int(mask.sum()), dtype=covariance.dtype)
    coefficients: Tensor = torch.linalg.solve(kept, covariance[mask][:, ~mask]).T
    return coefficients, mean[~mask] - coefficients @ mean[mask]


def _norms(model: nn.Module, group: Group) -> Tensor:
    """Product over layers of the L2 norms of a unit's weights, without biases; in the shape of the group."""
    product = torch.ones(group.shape, dtype=torch.float64)
    for part in group.slices:
        weight = model.get_parameter(part.param)
        if weight.dim() > 1:
            product *= unit_sums(replace(group, slices=(part,)), {part.param: weight.detach().double().square()}).sqrt()
    return product
