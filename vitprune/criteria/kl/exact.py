"""Exact KL importance (UP-ViTs) from cached activations: only the layers after an ablated unit run again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.architectures.chain import AttentionLayers, Branch, Chain, Step
from vitprune.architectures.chain_builders import build_chain
from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.criteria.kl.branch_ablation import BranchContext, ablation_fn
from vitprune.criteria.kl.fast_matmul import full_precision, raise_mmap_threshold
from vitprune.criteria.kl.leave_one_out import copy_without_unit, leave_one_out_kl
from vitprune.criteria.kl.partial_forward import logits_from_step, num_tokens_needed, step_inputs
from vitprune.criteria.kl.residual_ablation import drop_residual_channels
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.progress import track

KINDS = ("residual", "attention", "head", "ffn", "block")
STREAMS = 20  # activations per candidate, in units of the largest stream
LOGITS = 4  # copies of the attention logits and of the output logits
CACHE = 24 << 20  # bytes; on a CPU, larger batches of candidates miss the cache and are slower


def exact_kl(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a unit by sum over images of KL(model || model without the unit), in nats.

    Same values as `leave_one_out_kl`, faster. A float64 model is scored in float64. A float32 model runs in float32 and
    its divergences are computed in float64 from float32 logits, whose rounding error is about 1e-6: scores below about
    1e-9 nats per image are noise. Groups of whole blocks (`Group.whole_blocks`) and branches are scored by
    `leave_one_out_kl`.

    Args:
        model: The model; `architectures.chain_builders` must support it.
        groups: Groups of any kind but `weight`.
        batches: Calibration batches; labels are not used.
        context: The scoring options; `memory` limits the cached activations.

    Raises:
        BadInput: no batches, or a model or group that exact scoring does not support.

    Source: UP-ViTs equation 1.
    """
    if not batches:
        raise BadInput("kl: needs images; give calibration batches")
    dense = [group for group in groups if group.whole_blocks or group.kind == "branch"]
    if dense:
        others = [group for group in groups if group not in dense]
        whole_scores = leave_one_out_kl(model, dense, batches, context).scores
        return Importance(whole_scores | (exact_kl(model, others, batches, context).scores if others else {}))
    everything = {group.name: torch.arange(group.num_candidates) for group in groups}
    scores = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    for group in groups:
        scores[group.name][group.num_candidates :] = torch.inf
    for images, _ in track(batches, "scoring units, batch by batch"):
        for name, result in kl_divergences(model, groups, everything, images, context).items():
            scores[name][: len(result)] += result.sum(1)
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def kl_divergences(
    model: nn.Module, groups: Sequence[Group], chosen: Mapping[str, Tensor], images: Tensor, context: ScoringContext
) -> dict[str, Tensor]:
    """Return KL(model || model without the unit) for selected units and every image, in nats.

    Args:
        model: The model.
        groups: Its groups.
        chosen: Group name -> flat unit indices, (units,).
        images: (B, C, H, W).
        context: The scoring options; about `memory` bytes of activations are held at a time.

    Returns:
        Group name -> (units, images), float64, on the CPU.

    Raises:
        BadInput: a model or group that exact scoring does not support, or an index out of range.
    """
    jobs = [(group, chosen[group.name].cpu()) for group in groups if group.name in chosen]
    chain = build_chain(model)
    for group, units in jobs:
        _check(chain, group, units)
    device = next(model.parameters()).device
    result = {group.name: torch.empty(len(units), len(images), dtype=torch.float64) for group, units in jobs}
    with eval_mode(model), full_precision(device):
        raise_mmap_threshold(device)
        size = 1
        if len(images) > 1:
            size = _images_at_once(_dense_pass(model, chain, images[:1].to(device)), context.config.memory)
        parts = (slice(first, first + size) for first in range(0, len(images), size))
        dense_passes = ((part, _dense_pass(model, chain, images[part].to(device))) for part in parts)
        effort = sum(len(units) * _depth(chain, group) for group, units in jobs) * -(-len(images) // size)
        for _ in track(_fill(result, jobs, dense_passes, context.config.memory), "removing units", total=effort):
            pass
    return result


@dataclass(frozen=True)
class _DensePass:
    """The unpruned model's cached activations for some images: input stream of every step, and float64 logits."""

    model: nn.Module
    chain: Chain
    images: Tensor
    streams: list[Tensor]
    logits: Tensor


def _dense_pass(model: nn.Module, chain: Chain, images: Tensor) -> _DensePass:
    streams = step_inputs(chain, images)
    return _DensePass(model, chain, images, streams, chain.run_head(streams[-1]).double())


def _check(chain: Chain, group: Group, units: Tensor) -> None:
    if group.kind not in KINDS:
        raise BadInput(f"{group.name}: exact scoring removes {', '.join(KINDS)}, not kind {group.kind!r}")
    if group.whole_blocks:
        raise BadInput(f"{group.name}: blocks that are removed with all their layers can be scored only by kl-literal")
    sublayers = [body for body, *_ in group.sublayers] or [group.owner or group.name]
    missing = [body for body in sublayers if group.kind != "residual" and chain.branch_index(body) is None]
    if missing:
        raise BadInput(f"{missing[0]}: the model has no branch of that name; find its groups again")
    if len(units) and not 0 <= int(units.min()) <= int(units.max()) < group.num_candidates:
        raise BadInput(f"{group.name}: unit {int(units.max())} is out of range 0 to {group.num_candidates - 1}")


def _step_index(chain: Chain, group: Group) -> int:
    index = chain.branch_index(group.owner or group.name)
    return 0 if index is None else index


def _depth(chain: Chain, group: Group) -> int:
    """Number of steps that run for a candidate; the unit of the progress bar."""
    return len(chain.steps) - _step_index(chain, group)


def _fill(
    result: dict[str, Tensor],
    jobs: Sequence[tuple[Group, Tensor]],
    dense_passes: Iterable[tuple[slice, _DensePass]],
    memory: int,
) -> Iterator[None]:
    """Fill `result` by minibatches of images and units; yield once per step that a candidate ran."""
    for images, dense in dense_passes:
        for group, units in (job for job in jobs if len(job[1])):
            first = 0
            for part in _divergences(dense, group, units, memory):
                result[group.name][first : first + len(part), images] = part.cpu()
                first += len(part)
                yield from [None] * (len(part) * _depth(dense.chain, group))


def _divergences(dense: _DensePass, group: Group, units: Tensor, memory: int) -> Iterator[Tensor]:
    """Yield the divergences of the units in minibatches, (C, B)."""
    run = RUNS.get(group.kind, _branch_run)(dense, group)
    one_at_a_time = group.kind == "block" or (group.kind == "residual" and not dense.chain.allows_channel_ablation)
    count = 1 if one_at_a_time else max(1, _limit(dense, memory) // _in_flight(dense, _step_index(dense.chain, group)))
    for batch in torch.split(units, count):
        yield _divergence(dense.logits, run(batch.to(dense.logits.device)))


def _branch_run(dense: _DensePass, group: Group) -> Step:
    """Return a function from units (C,) of one branch to logits (C * B, classes) without them."""
    index = _step_index(dense.chain, group)
    branch = dense.chain.steps[index]
    assert isinstance(branch, Branch)
    queries = num_tokens_needed(dense.chain, index)
    context = BranchContext(branch, dense.streams[index], dense.streams[index + 1], queries)
    ablate = ablation_fn(dense.model, group, context)
    return lambda units: logits_from_step(dense.chain, index + 1, ablate(units).flatten(0, 1))


def _residual_run(dense: _DensePass, group: Group) -> Step:
    """Ablate residual channels; unless `chain.allows_channel_ablation`, shrink the model channel by channel."""

    def run(units: Tensor) -> Tensor:
        if not dense.chain.allows_channel_ablation:
            logits: Tensor = copy_without_unit(dense.model, group, int(units))(dense.images)
            return logits
        candidates = drop_residual_channels(dense.chain, units, len(dense.images))
        return logits_from_step(candidates, 0, candidates.embed(dense.streams[0]))

    return run


def _block_run(dense: _DensePass, group: Group) -> Step:
    """Ablate pairs of neighboring branches, which are skipped one pair at a time."""

    def run(units: Tensor) -> Tensor:
        start = dense.chain.branch_index(group.sublayers[int(units)][0]) or 0
        return logits_from_step(dense.chain, start + 2, dense.streams[start])

    return run


RUNS: dict[str, Callable[[_DensePass, Group], Step]] = {"residual": _residual_run, "block": _block_run}


def _divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """Return KL in nats of candidates' logits (C * B, ..., classes) from (B, ..., classes), summed over positions."""
    # With d = change of the logits minus its mean under p, sum p (log p - log q) = log(1 + sum p (e^d - 1)). This is
    # accurate to about 1e-16 relative to d, where a difference of logarithms is accurate to 1e-16 absolute.
    probability = dense.softmax(-1)
    change = logits.double().view(-1, *dense.shape) - dense
    change = change - (probability * change).sum(-1, keepdim=True)
    if bool((change > 500).any()):  # the exponential would overflow
        divergence = (dense.log_softmax(-1) + change).logsumexp(-1)
    else:
        divergence = (probability * change.expm1()).sum(-1).log1p()
    return divergence.flatten(2).sum(2) if divergence.dim() > 2 else divergence


def _in_flight(dense: _DensePass, index: int) -> int:
    """Bytes per candidate from a step on: the branch, the attention logits and the output logits."""
    largest = max(dense.streams[index + 1 :], key=lambda stream: stream.nbytes)
    inner = [step.layers for step in dense.chain.steps[index + 1 :] if isinstance(step, Branch)]
    heads = max((inside.heads for inside in inner if isinstance(inside, AttentionLayers)), default=0)
    pairs = largest[..., 0].numel() * largest[0, ..., 0].numel()
    return STREAMS * largest.nbytes + LOGITS * (heads * pairs * largest.element_size() + dense.logits.nbytes)


def _images_at_once(single: _DensePass, memory: int) -> int:
    """Number of images whose streams, and one candidate each, fit into the memory."""
    kept = memory // 2 // sum(stream.nbytes for stream in single.streams)
    return max(1, min(kept, _limit(single, memory) // _in_flight(single, 0)))


def _limit(dense: _DensePass, memory: int) -> int:
    return min(memory // 2, CACHE) if dense.logits.device.type == "cpu" else memory // 2
