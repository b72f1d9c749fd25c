"""Structured OBS (unit-obs): greedy elimination of units, basis change of attention, ridge refit of consumers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.config.prune_config import HEAD_CHANNELS
from vitprune.criteria import Batches, Criterion, Importance, ScoringContext, Statistics, Update
from vitprune.criteria.moments import (
    Consumer,
    collect_layer_moments,
    collect_unit_moments,
    find_consumer,
    find_projections,
)
from vitprune.criteria.obs.attention_basis import LogitsBasis, OutputBasis, logits_basis, output_basis
from vitprune.criteria.obs.stream import importance_matrix, refit_readers, stream_readers
from vitprune.criteria.obs.unit_elimination import eliminate_units, ridge_refit
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.progress import track

KINDS = ("ffn", "head", *HEAD_CHANNELS, "residual")
QUERY, KEY, VALUE = 0, 1, 2  # positions in `Projections.layers`
TINY = 1e-300
RIDGE = 1e-3  # of elimination; `ridge_refit` selects another


def unit_obs(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score FFN units and heads by greedy OBS elimination, attention channels by energy in a new basis; in nats.

    FFN units and heads: w_j^T G w_j / (2 [C^-1]_jj), with C the second moment of the consumer's inputs and G the Fisher
    metric of its outputs. Channels of heads: those of `logits_basis` and `output_basis`, sorted by energy. Residual
    channels, of a rotated stream only: the diagonal of `importance_matrix`. The update changes the basis of attentions
    and refits the consumers, for any masks, without the images.

    Args:
        model: The dense model.
        groups: Groups of kind `ffn`, `head`, `attention`, `qk`, `vo` or `residual`.
        batches: Calibration batches; labels are not used.
        context: The scoring options.

    Raises:
        BadInput: no batches, a group of another kind, or a group without exactly one consumer.

    Source: CAP's elimination with the Fisher metric of UP-ViTs' KL; the refit is ridge regression on the dense outputs.
    """
    for group in groups:
        if group.kind not in KINDS:
            raise BadInput(f"{group.name}: unit-obs scores {', '.join(KINDS)}, not kind {group.kind!r}")
    readers = stream_readers(model) if any(group.kind == "residual" for group in groups) else []
    units = [group for group in groups if group.kind != "residual"]
    statistics = collect_unit_moments(model, units, batches, context, grads=True) if units else {}
    if readers:
        statistics |= collect_layer_moments(model, readers, [], batches, context, None)
    scores: Scores = {}
    for group in track(groups, "eliminating units"):
        if group.kind == "residual":
            scores[group.name] = importance_matrix(model, batches, context).diagonal().view(group.shape)
        else:
            losses = _channel_losses if group.kind in HEAD_CHANNELS else _unit_losses
            scores[group.name] = losses(model, group, statistics)
    return Importance(scores, unit_obs_update(model, groups, statistics), statistics=statistics)


def unit_obs_update(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """Return the update that changes the basis of q, k and v, and refits the consumers, for any masks."""

    def update(masks: Masks) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        chosen = [group for group in groups if group.name in masks]
        for group in sorted(chosen, key=lambda group: group.kind == "residual"):
            if group.kind == "residual":  # reads what the others have changed
                result |= refit_readers(model, statistics, masks[group.name], result)
            elif group.kind in HEAD_CHANNELS:  # those of q and k are in one layer with those of v
                result |= _rotate_and_refit(model, group, statistics, masks[group.name], result)
            else:
                result |= refit_consumer(model, group, statistics, masks[group.name])
        return result

    return update


def refit_update(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """Return the update that refits the consumers, for masks of any criterion."""

    def update(masks: Masks) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for group in (group for group in groups if group.name in masks and group.kind != "residual"):
            result |= refit_consumer(model, group, statistics, masks[group.name])
        return result

    return update


def with_refit_update(criterion: Criterion) -> Criterion:
    """Return a criterion with the scores of the given one and the refit as update."""

    def refitted(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
        result = criterion(model, groups, batches, context)
        units = [group for group in groups if group.kind != "residual"]
        statistics = collect_unit_moments(model, units, batches, context)
        return Importance(result.scores, refit_update(model, groups, statistics), result.facts, statistics)

    return refitted


def refit_consumer(model: nn.Module, group: Group, statistics: Statistics, mask: Tensor) -> dict[str, Tensor]:
    """Return the refitted weight and bias of a group's consumer by name; empty if the mask keeps everything."""
    if bool(mask.all()):
        return {}
    reader = find_consumer(model, group)
    kept = mask.flatten().repeat_interleave(reader.inner).nonzero().flatten()
    return _refit_params(model, reader, statistics, kept)


def rotate_attention(
    model: nn.Module, group: Group, statistics: Statistics, changed: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], OutputBasis | None]:
    """Return the parameters of an attention in a new basis of a group's channels, by name, and the basis of v and proj.

    The attention computes the same function as before. For channels of q and k, the second basis is None.

    Args:
        model: The model.
        group: Channels of q and k, of v and proj, or of both.
        statistics: Those of `collect_unit_moments`.
        changed: Parameters that are used instead of the model's.
    """
    logits, output = _bases(model, group, statistics)
    projections, result, sides = find_projections(group), {}, dict[int, Tensor]()
    if logits is not None:
        sides = {QUERY: logits.query, KEY: logits.key}
    if output is not None:
        sides[VALUE] = output.value
    known = {name: value.detach() for name, value in model.named_parameters()} | dict(changed)
    for path in dict.fromkeys(projections.layers[role] for role in sides):
        roles = [role for role, layer in enumerate(projections.layers) if layer == path]
        for name in (name for name in (f"{path}.weight", f"{path}.bias") if name in known):
            old = known[name].cpu().double()
            rows = old.reshape(len(roles) * projections.heads, group.shape[1], -1)
            same = torch.eye(group.shape[1], dtype=torch.float64).expand(projections.heads, -1, -1)
            matrices = torch.cat([sides[role].transpose(1, 2) if role in sides else same for role in roles])
            result[name] = (matrices @ rows).reshape(old.shape)
    if output is not None:
        name = f"{find_consumer(model, group).path}.weight"
        result[name] = known[name].cpu().double() @ _block_diagonal(output.back)
    return result, output


def _rotate_and_refit(
    model: nn.Module, group: Group, statistics: Statistics, mask: Tensor, changed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the new basis, and proj refitted on the kept channels of it."""
    if bool(mask.all()):
        return {}
    result, output = rotate_attention(model, group, statistics, changed)
    if output is None:
        return result
    kept = mask.flatten().nonzero().flatten()
    reader = find_consumer(model, group)
    return result | _refit_params(model, reader, statistics, kept, _block_diagonal(output.value))


def _refit_params(
    model: nn.Module, reader: Consumer, statistics: Statistics, kept: Tensor, basis: Tensor | None = None
) -> dict[str, Tensor]:
    layer = {name: value.detach().cpu() for name, value in model.get_submodule(reader.path).named_parameters()}
    moments = statistics[f"{reader.path}/inputs"]
    weight, bias = ridge_refit(layer["weight"], layer.get("bias"), moments, kept, basis)
    return {f"{reader.path}.weight": weight} | ({} if bias is None else {f"{reader.path}.bias": bias})


def _unit_losses(model: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    reader = find_consumer(model, group)
    inputs = statistics[f"{reader.path}/inputs"].sum(dim=0)
    weight = model.get_parameter(f"{reader.path}.weight").detach().cpu()
    metric = statistics[f"{reader.path}/metric"] / inputs[-1, -1]  # per token
    return eliminate_units(weight, inputs, metric, reader.inner, RIDGE).view(group.shape)


def _bases(model: nn.Module, group: Group, statistics: Statistics) -> tuple[LogitsBasis | None, OutputBasis | None]:
    """Return the new bases of q and k, and of v and proj; None for channels that are not in the group."""
    logits = output = None
    if group.kind != "vo":
        maker = find_projections(group).path
        logits = logits_basis(statistics[f"{maker}/query"], statistics[f"{maker}/key"])
    if group.kind != "qk":
        reader = find_consumer(model, group).path
        weight = model.get_parameter(f"{reader}.weight").detach().cpu()
        output = output_basis(statistics[f"{reader}/inputs"].sum(dim=0), weight, group.shape[0])
    return logits, output


def _channel_losses(model: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    """Loss in nats of every channel of the new basis, through logits and output; (heads, c), descending."""
    nats = torch.zeros(group.shape, dtype=torch.float64)
    logits, output = _bases(model, group, statistics)
    if logits is not None:
        maker = find_projections(group).path
        # the mean squared gradient w.r.t. a logit is that w.r.t. q divided by the second moment of k
        key_energy = statistics[f"{maker}/key"].diagonal(dim1=1, dim2=2).sum(dim=1)  # (heads,)
        grad_sq = statistics[f"{maker}/query_grad_sq"] / (statistics[f"{maker}/tokens"] * key_energy).clamp_min(TINY)
        nats += grad_sq[:, None] * logits.energies
    if output is not None:
        reader = find_consumer(model, group).path
        weight = model.get_parameter(f"{reader}.weight").detach().cpu().double()
        columns = (weight @ _block_diagonal(output.back)).T  # (heads * c, o), for inputs of variance 1
        nats += torch.einsum("co,op,cp->c", columns, statistics[f"{reader}/metric"], columns).view(group.shape)
    return (nats / 2).flip(1).cummax(dim=1).values.flip(1)


def _block_diagonal(parts: Tensor) -> Tensor:
    """Block-diagonal matrix of the transposed heads' matrices; (heads, c, c) -> (heads * c, heads * c)."""
    heads, width, _ = parts.shape
    joined = torch.zeros(heads, width, heads, width, dtype=parts.dtype)
    for head in range(heads):
        joined[head, :, head] = parts[head].T
    return joined.view(heads * width, heads * width)
