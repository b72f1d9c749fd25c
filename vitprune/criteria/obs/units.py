"""Structured greedy OBS: units of every kind in nats, each removed where it costs least, and the survivors refitted."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Criterion, Importance, ScoreConfig, Statistics, Update
from vitprune.criteria.moments import Consumer, collect, consumer, producer
from vitprune.criteria.obs.attention_basis import Bases, bases
from vitprune.criteria.obs.unit_elimination import eliminate, refit
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.progress import track

TINY = 1e-300
RIDGE = 1e-3  # of elimination; the refit chooses its own


def unit_obs(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score FFN units and heads by greedy elimination, attention channels after `rebase`; all in nats per image set.

    FFN units and heads are removed one by one at w_j^T G w_j / [C^-1]_jj, C the second moment of what the consumer
    reads and G the Fisher matrix of what it writes, both downdated. Attention channels are those of a new basis of
    each head (bases.py), in which the last ones carry least. `update` gives the new basis and the refitted consumer
    for any masks; the images are not needed again.

    Raises:
        BadInput: no batches, single weights or residual channels, or a module that has no one consumer.

    Source: CAP's elimination and UP-ViTs' currency in one; the refit is ridge regression on the dense outputs.
    """
    refused = [group for group in groups if group.kind not in ("ffn", "head", "attention")]
    if refused:
        raise BadInput(f"{refused[0].name}: unit-obs scores ffn, head and attention, not kind {refused[0].kind!r}")
    statistics = collect(model, groups, batches, setting, slopes=True)
    scores: Scores = {}
    for group in track(groups, "eliminating units"):
        scores[group.name] = (_channels if group.kind == "attention" else _eliminated)(model, group, statistics)
    return Importance(scores, turning(model, groups, statistics), statistics=statistics)


def turning(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """The update that gives q, k and v new bases, and refits the consumers, for any masks of these groups."""

    def update(masks: Masks) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in (group for group in groups if group.name in masks):
            find = _rebased if group.kind == "attention" else refitted
            found |= find(model, group, statistics, masks[group.name])
        return found

    return update


def refitting(model: nn.Module, groups: Sequence[Group], statistics: Statistics) -> Update:
    """The update that refits the consumers alone, for masks of any criterion."""

    def update(masks: Masks) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group in (group for group in groups if group.name in masks and group.kind != "residual"):
            found |= refitted(model, group, statistics, masks[group.name])
        return found

    return update


def with_refit(criterion: Criterion) -> Criterion:
    """The same scores, and the refit as their update."""

    def refitted_too(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
        found = criterion(model, groups, batches, setting)
        statistics = collect(model, [group for group in groups if group.kind != "residual"], batches, setting)
        return Importance(found.scores, refitting(model, groups, statistics), found.facts, statistics)

    return refitted_too


def refitted(model: nn.Module, group: Group, statistics: Statistics, mask: Tensor) -> dict[str, Tensor]:
    """The consumer of a group refitted to its dense output on what the mask keeps; nothing where it keeps all."""
    if bool(mask.all()):
        return {}
    reader = consumer(model, group)
    kept = mask.flatten().repeat_interleave(reader.inner).nonzero().flatten()
    return _solved(model, reader, statistics, kept)


def rebased(model: nn.Module, group: Group, statistics: Statistics) -> dict[str, Tensor]:
    """q, k, v and proj of an attention group in its new basis, by parameter name: another form of the same function."""
    turn, (qkv, proj) = _bases(model, group, statistics), (producer(model, group), consumer(model, group).path)
    sides = torch.cat([turn.query, turn.key, turn.value]).transpose(1, 2)  # (3 * heads, c, c)
    found = {}
    for name in (f"{qkv}.weight", f"{qkv}.bias"):
        old = dict(model.named_parameters()).get(name)
        if old is not None:
            rows = old.detach().cpu().double().reshape(len(sides), sides.shape[1], -1)
            found[name] = (sides @ rows).reshape(old.shape)
    weight = model.get_parameter(f"{proj}.weight").detach().cpu().double()
    found[f"{proj}.weight"] = weight @ _blocks(turn.back)
    return found


def _rebased(model: nn.Module, group: Group, statistics: Statistics, mask: Tensor) -> dict[str, Tensor]:
    """The new basis, and proj refitted to its dense output on the channels of it that stay."""
    if bool(mask.all()):
        return {}
    basis = _blocks(_bases(model, group, statistics).value)
    kept = mask.flatten().nonzero().flatten()
    return rebased(model, group, statistics) | _solved(model, consumer(model, group), statistics, kept, basis)


def _solved(
    model: nn.Module, reader: Consumer, statistics: Statistics, kept: Tensor, basis: Tensor | None = None
) -> dict[str, Tensor]:
    layer = model.get_submodule(reader.path)
    weight, bias = layer.get_parameter("weight").detach().cpu(), dict(layer.named_parameters()).get("bias")
    solved = refit(weight, statistics[f"{reader.path}/inputs"], kept, bias is not None, basis)
    full = torch.zeros(weight.shape, dtype=torch.float64).index_copy(1, kept, solved.weight)
    found = {f"{reader.path}.weight": full}
    if bias is not None:
        found[f"{reader.path}.bias"] = bias.detach().cpu() + solved.bias
    return found


def _eliminated(model: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    reader = consumer(model, group)
    inputs = statistics[f"{reader.path}/inputs"].sum(dim=0)
    weight = model.get_parameter(f"{reader.path}.weight").detach().cpu()
    metric = statistics[f"{reader.path}/metric"] / inputs[-1, -1]  # per token
    return eliminate(weight, inputs, metric, reader.inner, RIDGE).view(group.shape)


def _bases(model: nn.Module, group: Group, statistics: Statistics) -> Bases:
    maker, reader = producer(model, group), consumer(model, group).path
    weight = model.get_parameter(f"{reader}.weight").detach().cpu()
    moments = statistics[f"{reader}/inputs"].sum(dim=0)
    return bases(statistics[f"{maker}/query"], statistics[f"{maker}/key"], moments, weight)


def _channels(model: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    """Nats of every channel of the new basis, by what its logits and its output carry; (heads, c), falling.

    The mean square of a logit's gradient follows from that of q's, as they differ by the second moment of k.
    """
    maker, reader = producer(model, group), consumer(model, group).path
    turn = _bases(model, group, statistics)
    spread = statistics[f"{maker}/key"].diagonal(dim1=1, dim2=2).sum(dim=1)  # (heads,)
    steep = statistics[f"{maker}/slope"] / (statistics[f"{maker}/tokens"] * spread).clamp_min(TINY)
    weight = model.get_parameter(f"{reader}.weight").detach().cpu().double()
    columns = (weight @ _blocks(turn.back)).T  # (heads * c, o), for inputs of variance 1
    output = torch.einsum("co,op,cp->c", columns, statistics[f"{reader}/metric"], columns).view(group.shape)
    nats = (steep[:, None] * turn.logits + output) / 2
    return nats.flip(1).cummax(dim=1).values.flip(1)


def _blocks(parts: Tensor) -> Tensor:
    """The transposed heads' matrices along the diagonal of one; (heads, c, c) -> (heads * c, heads * c)."""
    heads, width, _ = parts.shape
    joined = torch.zeros(heads, width, heads, width, dtype=parts.dtype)
    for head in range(heads):
        joined[head, :, head] = parts[head].T
    return joined.view(heads * width, heads * width)
