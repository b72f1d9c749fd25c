"""Optimal Brain Compression: OBS elimination of every output row on the input Hessian, and a least-squares update."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext, Statistics, Update, layer_io
from vitprune.criteria.moments import collect_layer_moments
from vitprune.criteria.obs.greedy import eliminate_weights, loss_increments
from vitprune.criteria.obs.unit_elimination import RIDGES, add_ridge, fit_and_test_moments
from vitprune.criteria.obs.weight_blocks import split_into_blocks
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.progress import track

RIDGE = 1e-3  # of elimination; the update selects another
RIDGE_ROWS = 24
BYTES_PER_ENTRY = 3 * 8  # matrix, inverse or factor, and workspace
SOLVE_BYTES = 1 << 28  # for the matrices of the rows that are solved at once


def obc(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by its increment of the estimated loss in greedy elimination of its output row, in nats per image.

    The loss of a row is the squared change of its output over all tokens, after the update of the remaining weights,
    times the mean squared gradient of the logits w.r.t. that output: rows of all layers are comparable. With
    `context.pattern` (N, M), at most M - N of every M consecutive weights are removed; the others score infinity.
    A row of k weights costs k^3 / 3 multiply-adds; statistics hold 2 (k + 1)^2 numbers per layer.

    Args:
        model: the model.
        groups: groups of kind `weight`.
        batches: labelled calibration batches.
        context: the scoring options.

    Raises:
        BadInput: no batches, a group of another kind, or a layer that is neither Linear nor an ungrouped convolution.

    Source: Optimal Brain Compression (Frantar & Alistarh, NeurIPS 2022), ExactOBS by rows. The weighting by
        gradients is ours: K-FAC (Martens & Grosse, ICML 2015) with the diagonal of its second factor.
    """
    split_into_blocks(model, groups, 1, context.pattern[1] if context.pattern else 1)
    statistics = collect_layer_moments(
        model, [_path(model, group) for group in groups], {}, batches, context, "metric_diagonal"
    )
    images = sum(len(labels) for _, labels in batches)
    scores: Scores = {}
    for group in track(groups, "eliminating weights"):
        moments = statistics[f"{_path(model, group)}/inputs"].sum(dim=0)
        grad_sq = statistics[f"{_path(model, group)}/metric_diagonal"] / images
        rows = _rows(model, group)
        rows = rows * grad_sq.to(rows).sqrt()[:, None]
        scores[group.name] = _row_losses(rows, _conditional(model, group, moments), context).view(group.shape)
    return Importance(scores, obc_update(model, groups, statistics), statistics=statistics)


def obc_update(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """Return the update that solves every row by least squares on its kept inputs, for masks of any criterion."""

    def update(masks: Masks) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for group in track([group for group in groups if group.name in masks], "solving rows"):
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


def solve_rows(rows: Tensor, halves: Tensor, keep: Tensor, constant: bool, name: str) -> Tensor:
    """Fit every row's dense output by ridge regression on the inputs that its mask keeps.

    The ridge is the one of `RIDGES` with the least error on the fold of images that was not fitted, or the next larger
    one for which the matrices of all rows are positive definite.

    Args:
        rows: dense weights, (o, k), float64.
        halves: second moments of the inputs with a 1 appended, (folds, k+1, k+1).
        keep: (o, k) booleans.
        constant: whether the layer has a bias to refit.
        name: name of the weights, for the error message.

    Returns:
        (o, k+1): new weights, zero where removed; the last column is added to the bias.

    Raises:
        BadInput: the rows cannot be solved with any ridge.
    """
    keep_inputs = torch.cat([keep, torch.full_like(keep[:, :1], constant)], dim=1)
    sample = torch.arange(0, len(rows), max(1, len(rows) // RIDGE_ROWS), device=rows.device)
    errors = [
        sum(_held_out(rows[sample], a, b, keep_inputs[sample], ridge) for a, b in fit_and_test_moments(halves))
        for ridge in RIDGES
    ]
    best = int(torch.tensor(errors).nan_to_num(torch.inf).argmin())
    for ridge in RIDGES[best:]:
        solved = _solved(rows, halves.sum(dim=0), keep_inputs, ridge)
        if bool(solved.isfinite().all()):
            return solved
    raise BadInput(
        f"{name}: obc cannot solve its rows, the second moment of its inputs is not positive definite; "
        "check the weights and images, or exclude this layer"
    )


def _held_out(rows: Tensor, fit: Tensor, test: Tensor, keep_inputs: Tensor, ridge: float) -> float:
    """Squared error of the rows' outputs per token of the fold that was not fitted."""
    change = _solved(rows, fit, keep_inputs, ridge) - torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)
    return float(((change @ test) * change).sum()) / float(test[-1, -1])


def _solved(rows: Tensor, moments: Tensor, keep_inputs: Tensor, ridge: float) -> Tensor:
    """Solve all rows; NaN in rows whose matrix is not positive definite."""
    damped = add_ridge(moments, ridge)
    targets = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1) @ damped
    result = []
    for part in _row_chunks(len(rows), damped.shape[-1], SOLVE_BYTES):
        matrices = _restrict(damped, keep_inputs[part])
        factor, info = torch.linalg.cholesky_ex(matrices)
        solved = torch.cholesky_solve((targets[part] * keep_inputs[part])[..., None], factor)[..., 0]
        result.append(torch.where(info[:, None] == 0, solved, torch.nan))
    return torch.cat(result)


def _restrict(damped: Tensor, keep_inputs: Tensor) -> Tensor:
    """Restrict a matrix (k, k) to the kept inputs of each row, with the identity elsewhere; (rows, k, k)."""
    weights = keep_inputs.to(damped.dtype)
    return damped * weights[:, :, None] * weights[:, None, :] + torch.diag_embed(1 - weights)


def _row_losses(rows: Tensor, conditional: Tensor, context: ScoringContext) -> Tensor:
    """Return the losses of the weights of all rows; zero weights are removed first."""
    inverse = torch.linalg.inv(conditional)
    result = []
    for part in _row_chunks(len(rows), rows.shape[1], context.config.memory):
        weights = rows[part]
        if bool((weights == 0).any()):
            matrices = torch.linalg.inv(_restrict(conditional, weights != 0))
        else:
            matrices = inverse.expand(len(weights), -1, -1)
        losses = eliminate_weights(matrices, weights, pattern=context.pattern)
        result.append(losses if context.pattern else loss_increments(losses))
    return torch.cat(result)


def _conditional(model: nn.Module, group: Group, moments: Tensor) -> Tensor:
    """Second moment of a token's inputs, centered if the layer has a bias; (k, k)."""
    damped = add_ridge(moments, RIDGE) / moments[-1, -1]
    mean = damped[:-1, -1:] if _bias(model, group) is not None else torch.zeros_like(damped[:-1, -1:])
    conditional: Tensor = damped[:-1, :-1] - mean @ mean.T
    return conditional.to(model.get_parameter(group.slices[0].param).device)


def _row_chunks(rows: int, width: int, memory: int) -> Iterator[slice]:
    """Slice the rows so that the matrices of a slice fit into the memory; at least one row each."""
    size = max(1, memory // (BYTES_PER_ENTRY * width**2))
    return (slice(start, start + size) for start in range(0, rows, size))


def _rows(model: nn.Module, group: Group) -> Tensor:
    return model.get_parameter(group.slices[0].param).detach().double().flatten(1)


def _bias(model: nn.Module, group: Group) -> Tensor | None:
    layer = model.get_submodule(_path(model, group))
    bias = layer.bias
    return bias.detach().double() if isinstance(bias, Tensor) else None


def _path(model: nn.Module, group: Group) -> str:
    """Return the path of a group's layer; BadInput if it is not a plain layer."""
    param = group.slices[0].param
    path = param.removesuffix(".weight")
    if not param.endswith(".weight") or not layer_io.is_plain_layer(model.get_submodule(path)):
        raise BadInput(f"{group.name}: obc needs a Linear layer or an ungrouped convolution; exclude it")
    return path
