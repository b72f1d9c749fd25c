"""Optimal Brain Compression: each row of a layer loses the weights that its outputs miss least, and is solved anew."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoreConfig, Statistics, Update, layer_io
from vitprune.criteria.moments import sums
from vitprune.criteria.obs.greedy import eliminate, increments
from vitprune.criteria.obs.unit_elimination import RIDGES, damped, pairs
from vitprune.criteria.obs.weight_blocks import parts_of
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.progress import track

RIDGE = 1e-3  # of elimination; the update chooses its own, by this many rows of a layer
TRIED = 24
BYTES = 3 * 8  # of an entry of a row's matrix: the matrix, its inverse or factor, and what solving them takes
ROOM = 1 << 28  # bytes for the matrices of the rows that are solved at once


def obc(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by the nats per image that its removal adds, once greedy elimination of its row has come to it.

    A row's loss is the squared change of its output over all tokens, the others having made up for what went, times
    the mean squared slope of the answer by that output: so rows of all layers compete. Where N of every M weights
    are to stay (`setting.pattern`), no run loses more; those that stay are infinite. A row of k weights takes k^3 / 3
    multiplications and additions; statistics hold 2 (k + 1)^2 numbers per layer.

    Raises:
        BadInput: no batches, a group that is not of single weights, or a layer that is neither Linear nor a
            convolution of one group.

    Source: Optimal Brain Compression (Frantar & Alistarh, NeurIPS 2022), ExactOBS by rows; the slopes are ours, as in
    K-FAC (Martens & Grosse, ICML 2015) with the diagonal of its second factor.
    """
    parts_of(model, groups, 1, setting.pattern[1] if setting.pattern else 1)
    statistics = sums(model, [_path(model, group) for group in groups], {}, batches, setting, "each")
    images = sum(len(labels) for _, labels in batches)
    scores: Scores = {}
    for group in track(groups, "eliminating weights"):
        moments = statistics[f"{_path(model, group)}/inputs"].sum(dim=0)
        steep = statistics[f"{_path(model, group)}/each"] / images
        rows = _rows(model, group)
        rows = rows * steep.to(rows).sqrt()[:, None]
        scores[group.name] = _judged(rows, _conditional(model, group, moments), setting).view(group.shape)
    return Importance(scores, solving(model, groups, statistics), statistics=statistics)


def solving(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """The update that solves every row anew on what its mask keeps, for masks of any criterion."""

    def update(masks: Masks) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in track([group for group in groups if group.name in masks], "solving rows"):
            halves = statistics[f"{_path(model, group)}/inputs"]
            bias = _bias(model, group)
            rows = _rows(model, group)
            keep = masks[group.name].to(rows.device).view(rows.shape)
            solved = solve(rows, halves.to(rows.device), keep, bias is not None)
            found[group.slices[0].param] = solved[:, :-1].view(group.shape)
            if bias is not None:
                found[f"{_path(model, group)}.bias"] = bias + solved[:, -1]
        return found

    return update


def solve(rows: Tensor, halves: Tensor, keep: Tensor, constant: bool) -> Tensor:
    """Least squares of every row's own output on the inputs that it keeps, its ridge chosen on the other half's images.

    rows (o, k) float64, halves (halves, k+1, k+1) second moments with a 1 appended, keep (o, k) booleans. `constant`:
    the layer has a bias to refit. Returns (o, k+1): zero where nothing stays; last, what is added to the bias.
    """
    stays = torch.cat([keep, torch.full_like(keep[:, :1], constant)], dim=1)
    some = torch.arange(0, len(rows), max(1, len(rows) // TRIED), device=rows.device)
    errors = [sum(_held_out(rows[some], a, b, stays[some], ridge) for a, b in pairs(halves)) for ridge in RIDGES]
    return _solved(rows, halves.sum(dim=0), stays, RIDGES[int(torch.tensor(errors).argmin())])


def _held_out(rows: Tensor, fitted: Tensor, tried: Tensor, stays: Tensor, ridge: float) -> float:
    """Squared error of the rows' outputs, per token of the images that were not fitted to."""
    change = _solved(rows, fitted, stays, ridge) - torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)
    return float(((change @ tried) * change).sum()) / float(tried[-1, -1])


def _solved(rows: Tensor, moments: Tensor, stays: Tensor, ridge: float) -> Tensor:
    whole = damped(moments, ridge)
    aims = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1) @ whole
    found = []
    for part in _portions(len(rows), whole.shape[-1], ROOM):
        matrices = _among(whole, stays[part])
        factor = torch.linalg.cholesky(matrices)
        found.append(torch.cholesky_solve((aims[part] * stays[part])[..., None], factor)[..., 0])
    return torch.cat(found)


def _among(whole: Tensor, stays: Tensor) -> Tensor:
    """A matrix (k, k) among what stays of each row (rows, k), and the identity elsewhere; (rows, k, k)."""
    own = stays.to(whole.dtype)
    return whole * own[:, :, None] * own[:, None, :] + torch.diag_embed(1 - own)


def _judged(rows: Tensor, conditional: Tensor, setting: ScoreConfig) -> Tensor:
    """Losses of the weights of all rows, of which those that are zero have gone before."""
    inverse = torch.linalg.inv(conditional)
    found = []
    for part in _portions(len(rows), rows.shape[1], setting.memory):
        own = rows[part]
        if bool((own == 0).any()):
            matrices = torch.linalg.inv(_among(conditional, own != 0))
        else:
            matrices = inverse.expand(len(own), -1, -1)
        losses = eliminate(matrices, own, pattern=setting.pattern)
        found.append(losses if setting.pattern else increments(losses))
    return torch.cat(found)


def _conditional(model: nn.Module, group: Group, moments: Tensor) -> Tensor:
    """Second moment of a token's inputs, about their mean where a bias can make up for it; (k, k)."""
    whole = damped(moments, RIDGE) / moments[-1, -1]
    mean = whole[:-1, -1:] if _bias(model, group) is not None else torch.zeros_like(whole[:-1, -1:])
    conditional: Tensor = whole[:-1, :-1] - mean @ mean.T
    return conditional.to(model.get_parameter(group.slices[0].param).device)


def _portions(rows: int, width: int, memory: int) -> Iterator[slice]:
    """Rows in order, as many at a time as their matrices fit into the memory; at least one."""
    size = max(1, memory // (BYTES * width**2))
    return (slice(start, start + size) for start in range(0, rows, size))


def _rows(model: nn.Module, group: Group) -> Tensor:
    return model.get_parameter(group.slices[0].param).detach().double().flatten(1)


def _bias(model: nn.Module, group: Group) -> Tensor | None:
    layer = model.get_submodule(_path(model, group))
    bias = layer.bias
    return bias.detach().double() if isinstance(bias, Tensor) else None


def _path(model: nn.Module, group: Group) -> str:
    """Path of a group's layer.

    Raises:
        BadInput: it is no plain layer.
    """
    param = group.slices[0].param
    path = param.removesuffix(".weight")
    if not param.endswith(".weight") or not layer_io.plain(model.get_submodule(path)):
        raise BadInput(f"{group.name}: obc needs a Linear layer, or a convolution of one group; leave it out")
    return path
