"""CORP: units of least energy go, and what they carried is predicted affinely from those that stay."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoreConfig, Statistics, Update
from vitprune.criteria.moments import collect, consumer
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores, unit_sums

RIDGE = 1e-3  # absolute, as the authors' own rule gives in every layer of a small model


def corp(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score FFN units by E[x_j^2] times the norms of their rows in both layers; the update predicts them affinely.

    Raises:
        BadInput: no batches, or a group that is not of FFN units.

    Source: CORP (arXiv 2602.05243), its ranking by energy and weights, statistics of the dense model. What it cuts of
    q and k alone is not here: timm's attention has one width for q, k and v.
    """
    refused = [group for group in groups if group.kind != "ffn"]
    if refused:
        raise BadInput(f"{refused[0].name}: corp scores ffn, not kind {refused[0].kind!r}; set prune.kinds to [ffn]")
    statistics = collect(model, groups, batches, setting)
    scores: Scores = {}
    for group in groups:
        moments = statistics[f"{consumer(model, group).path}/inputs"].sum(dim=0)
        energy = moments.diagonal()[:-1] / moments[-1, -1]
        scores[group.name] = energy.view(group.shape) * _norms(model, group)
    return Importance(scores, predicting(model, groups, statistics), statistics=statistics)


def predicting(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """The update that puts what removed units are predicted to be into the weights and the bias of their consumer."""

    def update(masks: Masks) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in (group for group in groups if group.name in masks and not bool(masks[group.name].all())):
            path, mask = consumer(model, group).path, masks[group.name].flatten()
            layer = dict(model.get_submodule(path).named_parameters())
            weight = layer["weight"].detach().cpu().double()  # (o, k)
            share, constant = predicted(statistics[f"{path}/inputs"].sum(dim=0), mask)
            found[f"{path}.weight"] = weight.clone()
            found[f"{path}.weight"][:, mask] += weight[:, ~mask] @ share
            if "bias" in layer:
                found[f"{path}.bias"] = layer["bias"].detach().cpu() + weight[:, ~mask] @ constant
        return found

    return update


def predicted(moments: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Affine ridge of the removed inputs on the kept ones; (removed, kept) and (removed,).

    moments (k+1, k+1): second moment with a 1 appended; mask (k,): True stays.
    """
    mean = moments[:-1, -1] / moments[-1, -1]
    spread = moments[:-1, :-1] / moments[-1, -1] - torch.outer(mean, mean)
    kept = spread[mask][:, mask] + RIDGE * torch.eye(int(mask.sum()), dtype=spread.dtype)
    share: Tensor = torch.linalg.solve(kept, spread[mask][:, ~mask]).T
    return share, mean[~mask] - share @ mean[mask]


def _norms(model: nn.Module, group: Group) -> Tensor:
    """Product of the norms of a unit's weights in every layer, biases left out; shape of the group."""
    product = torch.ones(group.shape, dtype=torch.float64)
    for part in group.slices:
        weight = model.get_parameter(part.param)
        if weight.dim() > 1:
            alone = Group(group.name, group.kind, group.shape, (part,))
            product *= unit_sums(alone, {part.param: weight.detach().double().square()}).sqrt()
    return product
