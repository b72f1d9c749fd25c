"""Optimal Brain Compression: OBS elimination of every output row on the input Hessian, and a least-squares update."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext, Statistics, Update, layer_io
from vitprune.criteria.moments import collect_layer_moments
from vitprune.criteria.obs.admm import nm_support
from vitprune.criteria.obs.channel_permutation import ChannelOrders, LayerLoss, channel_orders, permute_statistics
from vitprune.criteria.obs.greedy import eliminate_weights, loss_increments
from vitprune.criteria.obs.row_solve import row_chunks, solve_rows
from vitprune.criteria.obs.unit_elimination import add_ridge
from vitprune.criteria.obs.weight_blocks import fitting_groups, split_into_blocks
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores, permute
from vitprune.runtime.progress import track

MAX_INFLATION = 1e3  # up to which products in float32 leave the order of elimination as it is
RIDGE = 1e-3  # of elimination; the row solve selects another


def obc(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by its increment of the estimated loss in greedy elimination of its output row, in nats per image.

    The loss of a row is the squared change of its output over all tokens, after the update of the remaining weights,
    times the mean squared gradient of the logits w.r.t. that output: rows of all layers are comparable. With
    `context.pattern` (N, M), M - N of every M consecutive weights have a finite score; they are chosen for all rows at
    once by `nm_support`, after the channels were re-ordered by `channel_orders`. Groups that do not fit the pattern
    have infinite scores.
    A row of k weights costs k^3 / 3 multiply-adds; statistics hold 2 (k + 1)^2 numbers per layer.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        batches: Labeled calibration batches.
        context: The scoring options.

    Raises:
        BadInput: no batches, a group of another kind, or a layer that is neither Linear nor an ungrouped convolution.

    Source: Optimal Brain Compression (Frantar & Alistarh, NeurIPS 2022), ExactOBS by rows. The weighting by
        gradients is ours: K-FAC (Martens & Grosse, ICML 2015) with the diagonal of its second factor.
    """
    every = context.pattern[1] if context.pattern else 1
    fitting = fitting_groups(model, groups, every)
    split_into_blocks(model, fitting, 1, every)
    paths = [_path(model, group) for group in fitting]
    statistics = collect_layer_moments(model, paths, [], batches, context, "metric_diagonal")
    images = sum(len(labels) for _, labels in batches)
    chosen = ChannelOrders((), {})
    if context.pattern is not None and context.config.permute:
        losses = {group.slices[0].param: _layer_loss(model, group, statistics, images) for group in fitting}
        chosen = channel_orders(model, losses, context.pattern, batches[0][0])
        statistics = permute_statistics(statistics, chosen)
    ordered = permute(copy.deepcopy(model), chosen.groups, chosen.orders) if chosen.orders else model
    scores: Scores = {group.name: torch.full(group.shape, torch.inf, dtype=torch.float64) for group in groups}
    for group in track(fitting, "eliminating weights"):
        rows, conditional = _in_nats(ordered, group, statistics, images)
        if context.pattern is not None and context.config.nm_search == "admm":
            scores[group.name] = _support_scores(rows, conditional, context.pattern).view(group.shape)
        else:
            scores[group.name] = _row_losses(rows, conditional, context).view(group.shape)
    return Importance(scores, obc_update(model, groups, statistics), {}, statistics, chosen.orders)


def obc_update(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """Return the update that solves every row by least squares on its kept inputs, for masks of any criterion."""

    def update(masks: Masks) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        pruned = [group for group in groups if group.name in masks and f"{_path(model, group)}/inputs" in statistics]
        for group in track(pruned, "solving rows"):
            halves = statistics[f"{_path(model, group)}/inputs"]
            bias = _bias(model, group)
            rows = _rows(model, group)
            keep = masks[group.name].to(rows.device).view(rows.shape)
            solved = solve_rows(rows, halves.to(rows.device), keep, bias is not None, group.name)
            result[group.slices[0].param] = solved[:, :-1].view(group.shape)
            if bias is not None:
                result[f"{_path(model, group)}.bias"] = bias + solved[:, -1]
        return result

    return update


def _row_losses(rows: Tensor, conditional: Tensor, context: ScoringContext) -> Tensor:
    """Return the losses of the weights of all rows; zero weights are removed first."""
    inverse = torch.linalg.inv(conditional)
    inflation = float((inverse.diagonal() * conditional.diagonal()).max())  # of the variance, by correlated inputs
    precision = torch.float32 if inflation < MAX_INFLATION else torch.float64
    result = []
    for part in row_chunks(len(rows), rows.shape[1], context.config.memory):
        weights = rows[part]
        if bool((weights == 0).any()):
            # not by LU: torch's batched LU is wrong, or does not end, with several threads (pytorch issue 142815)
            factors, _ = torch.linalg.cholesky_ex(_restrict(conditional, weights != 0))
            matrices = torch.cholesky_inverse(factors).mT  # contiguous rows, as the elimination needs
        else:
            matrices = inverse.expand(len(weights), -1, -1)
        losses = eliminate_weights(matrices, weights, pattern=context.pattern, ahead=precision)
        result.append(losses if context.pattern else loss_increments(losses))
    return torch.cat(result)


def _restrict(damped: Tensor, keep_inputs: Tensor) -> Tensor:
    """Restrict a matrix (k, k) to the kept inputs of each row, with the identity elsewhere; (rows, k, k)."""
    weights = keep_inputs.to(damped.dtype)
    return damped * weights[:, :, None] * weights[:, None, :] + torch.diag_embed(1 - weights)


def _support_scores(rows: Tensor, conditional: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Return infinity for the weights of the support, and the loss of a removal alone for the others."""
    single = LayerLoss(rows, torch.linalg.inv(conditional)).single
    return single.masked_fill(nm_support(conditional, rows, pattern), torch.inf)


def _layer_loss(model: nn.Module, group: Group, statistics: Statistics, images: int) -> LayerLoss:
    rows, conditional = _in_nats(model, group, statistics, images)
    return LayerLoss(rows.cpu(), torch.linalg.inv(conditional).cpu())


def _in_nats(model: nn.Module, group: Group, statistics: Statistics, images: int) -> tuple[Tensor, Tensor]:
    """Rows (o, k), scaled so that their squared error is in nats per image, and the moment of their inputs (k, k)."""
    grad_sq = statistics[f"{_path(model, group)}/metric_diagonal"] / images
    rows = _rows(model, group)
    moments = statistics[f"{_path(model, group)}/inputs"].sum(dim=0)
    return rows * grad_sq.to(rows).sqrt()[:, None], _conditional(model, group, moments)


def _conditional(model: nn.Module, group: Group, moments: Tensor) -> Tensor:
    """Second moment of a token's inputs, centered if the layer has a bias; (k, k)."""
    damped = add_ridge(moments, RIDGE) / moments[-1, -1]
    mean = damped[:-1, -1:] if _bias(model, group) is not None else torch.zeros_like(damped[:-1, -1:])
    conditional: Tensor = damped[:-1, :-1] - mean @ mean.T
    return conditional.to(model.get_parameter(group.slices[0].param).device)


def _rows(model: nn.Module, group: Group) -> Tensor:
    return model.get_parameter(group.slices[0].param).detach().double().flatten(1)


def _bias(model: nn.Module, group: Group) -> Tensor | None:
    bias = model.get_submodule(_path(model, group)).bias
    return bias.detach().double() if isinstance(bias, Tensor) else None


def _path(model: nn.Module, group: Group) -> str:
    """Return the path of a group's layer; BadInput if it is not a plain layer."""
    param = group.slices[0].param
    path = param.removesuffix(".weight")
    if not param.endswith(".weight") or not layer_io.is_plain_layer(model.get_submodule(path)):
        raise BadInput(f"{group.name}: obc needs a Linear layer or an ungrouped convolution; exclude it")
    return path
