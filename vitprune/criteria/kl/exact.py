"""UP-ViTs' criterion, exactly, from what the whole model has computed: only what a removal changes is run again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.architectures.chain import Branch, Chain, SelfAttention, Step
from vitprune.architectures.chain_builders import chain as chain_of
from vitprune.criteria import Batches, Importance, ScoreConfig
from vitprune.criteria.kl.branch_ablation import BranchContext, ablation_fn
from vitprune.criteria.kl.fast_matmul import full_precision, keep_freed_memory
from vitprune.criteria.kl.leave_one_out import leave_one_out_kl, without
from vitprune.criteria.kl.partial_forward import needed, onwards, prefixes
from vitprune.criteria.kl.residual_ablation import drop_residual_channels
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.runtime.eval_mode import evaluating
from vitprune.runtime.progress import track

KINDS = ("residual", "attention", "head", "ffn", "block")
STREAMS = 20  # activations of a branch in flight, in streams of its size
LOGITS = 4  # copies of attention's logits and of the answer
CACHE = 24 << 20  # bytes; on a CPU, candidates that fall out of the processor's cache are slower


def exact_kl(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a unit by sum over images of KL(model || model without it): the numbers of kl.literal, sooner.

    A float64 model is scored in float64 throughout. A float32 model runs in float32, its divergences are taken in
    float64 of float32 logits: those carry rounding of about 1e-6, so a score below some 1e-9 nats per image is noise.

    Blocks that go as a whole are scored by kl.literal itself.

    Raises:
        BadInput: there are no images, or the model or a group is not understood; it is named.

    Source: UP-ViTs equation 1.
    """
    if not batches:
        raise BadInput("kl: needs images; give batches")
    whole = [group for group in groups if group.whole]
    if whole:
        others = [group for group in groups if not group.whole]
        known = leave_one_out_kl(model, whole, batches, setting).scores
        return Importance(known | (exact_kl(model, others, batches, setting).scores if others else {}))
    everything = {group.name: torch.arange(group.candidates) for group in groups}
    scores = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    for group in groups:
        scores[group.name][group.candidates :] = torch.inf
    for images, _ in track(batches, "scoring units, batch by batch"):
        for name, found in kl_divergences(model, groups, everything, images, setting).items():
            scores[name][: len(found)] += found.sum(1)
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def kl_divergences(
    model: nn.Module, groups: Sequence[Group], chosen: Mapping[str, Tensor], images: Tensor, setting: ScoreConfig
) -> dict[str, Tensor]:
    """KL(model || model without the unit) of every chosen unit on every image, in nats, float64.

    `chosen` maps names of groups to flat indices of units (units,); the result has them as (units, images), on the CPU.
    At most about `setting.memory` bytes of activations are held at a time.

    Raises:
        BadInput: the model or a group is not understood, or an index is out of range.
    """
    jobs = [(group, chosen[group.name].cpu()) for group in groups if group.name in chosen]
    chain = chain_of(model)
    for group, units in jobs:
        _check(chain, group, units)
    device = next(model.parameters()).device
    found = {group.name: torch.empty(len(units), len(images), dtype=torch.float64) for group, units in jobs}
    with evaluating(model), full_precision(device):
        keep_freed_memory(device)
        size = 1
        if len(images) > 1:
            size = _images_at_once(_whole(model, chain, images[:1].to(device)), setting.memory)
        parts = (slice(first, first + size) for first in range(0, len(images), size))
        wholes = ((part, _whole(model, chain, images[part].to(device))) for part in parts)
        effort = sum(len(units) * _depth(chain, group) for group, units in jobs) * -(-len(images) // size)
        for _ in track(_filled(found, jobs, wholes, setting.memory), "removing units", total=effort):
            pass
    return found


@dataclass(frozen=True)
class _Whole:
    """The whole model and what it makes of some images: every step's input stream and, in float64, the logits."""

    model: nn.Module
    chain: Chain
    images: Tensor
    streams: list[Tensor]
    logits: Tensor


def _whole(model: nn.Module, chain: Chain, images: Tensor) -> _Whole:
    streams = prefixes(chain, images)
    return _Whole(model, chain, images, streams, chain.finish(streams[-1]).double())


def _check(chain: Chain, group: Group, units: Tensor) -> None:
    if group.kind not in KINDS:
        raise BadInput(f"{group.name}: exact scoring removes {', '.join(KINDS)}, not kind {group.kind!r}")
    if group.whole:
        raise BadInput(f"{group.name}: blocks that go as a whole are scored by removal alone; use kl-literal")
    bodies = [body for body, *_ in group.sublayers] or [group.owner or group.name]
    missing = [body for body in bodies if group.kind != "residual" and chain.branch(body) is None]
    if missing:
        raise BadInput(f"{missing[0]}: the model has no branch of that name; find its groups again")
    if len(units) and not 0 <= int(units.min()) <= int(units.max()) < group.candidates:
        raise BadInput(f"{group.name}: has units 0 to {group.candidates - 1}; {int(units.max())} is not one of them")


def _place(chain: Chain, group: Group) -> int:
    place = chain.branch(group.owner or group.name)
    return 0 if place is None else place


def _depth(chain: Chain, group: Group) -> int:
    """Steps that a candidate runs: the measure of progress."""
    return len(chain.steps) - _place(chain, group)


def _filled(
    found: dict[str, Tensor],
    jobs: Sequence[tuple[Group, Tensor]],
    wholes: Iterable[tuple[slice, _Whole]],
    memory: int,
) -> Iterator[None]:
    """Fill in some images and some candidates at a time; yields once per step that a candidate has run."""
    for images, whole in wholes:
        for group, units in (job for job in jobs if len(job[1])):
            first = 0
            for part in _answers(whole, group, units, memory):
                found[group.name][first : first + len(part), images] = part.cpu()
                first += len(part)
                yield from [None] * (len(part) * _depth(whole.chain, group))


def _answers(whole: _Whole, group: Group, units: Tensor, memory: int) -> Iterator[Tensor]:
    """Divergences of the units, some at a time; (C, B)."""
    run = RUNS.get(group.kind, _branch_run)(whole, group)
    lone = group.kind == "block" or (group.kind == "residual" and not whole.chain.narrow)
    count = 1 if lone else max(1, _limit(whole, memory) // _in_flight(whole, _place(whole.chain, group)))
    for some in torch.split(units, count):
        yield _divergence(whole.logits, run(some.to(whole.logits.device)))


def _branch_run(whole: _Whole, group: Group) -> Step:
    """Logits (C * B, classes) of the model without units (C,) of one branch."""
    place = _place(whole.chain, group)
    branch = whole.chain.steps[place]
    assert isinstance(branch, Branch)
    around = BranchContext(branch, whole.streams[place], whole.streams[place + 1], needed(whole.chain, place))
    removed = ablation_fn(whole.model, group, around)
    return lambda units: onwards(whole.chain, place + 1, removed(units).flatten(0, 1))


def _narrow_run(whole: _Whole, group: Group) -> Step:
    """The same for residual channels; where the chain is not known to be narrow, the model is cut, one at a time."""

    def run(units: Tensor) -> Tensor:
        if not whole.chain.narrow:
            logits: Tensor = without(whole.model, group, int(units))(whole.images)
            return logits
        candidates = drop_residual_channels(whole.chain, units, len(whole.images))
        return onwards(candidates, 0, candidates.embed(whole.streams[0]))

    return run


def _block_run(whole: _Whole, group: Group) -> Step:
    """The same for pairs of neighbouring branches, one pair at a time, which are left out."""

    def run(units: Tensor) -> Tensor:
        start = whole.chain.branch(group.sublayers[int(units)][0]) or 0
        return onwards(whole.chain, start + 2, whole.streams[start])

    return run


RUNS: dict[str, Callable[[_Whole, Group], Step]] = {"residual": _narrow_run, "block": _block_run}


def _divergence(whole: Tensor, logits: Tensor) -> Tensor:
    """KL in nats of candidates' logits (C * B, ..., classes) from the model's (B, ..., classes); (C, B).

    The answers of a sequence, one per position, are summed.

    With d = the logits' change less its mean under p, sum p (log p - log q) = log(1 + sum p (e^d - 1)): the error is
    that of one part in 10^16 of d, where the difference of logarithms would lose it of 1.
    """
    share = whole.softmax(-1)
    change = logits.double().view(-1, *whole.shape) - whole
    change = change - (share * change).sum(-1, keepdim=True)
    if bool((change > 500).any()):  # the exponential would overflow
        each = (whole.log_softmax(-1) + change).logsumexp(-1)
    else:
        each = (share * change.expm1()).sum(-1).log1p()
    return each.flatten(2).sum(2) if each.dim() > 2 else each


def _in_flight(whole: _Whole, place: int) -> int:
    """Bytes that one candidate holds on its way from a step on: of a branch, of attention's logits, of the answer."""
    largest = max(whole.streams[place + 1 :], key=lambda stream: stream.nbytes)
    inner = [step.inside for step in whole.chain.steps[place + 1 :] if isinstance(step, Branch)]
    heads = max((inside.heads for inside in inner if isinstance(inside, SelfAttention)), default=0)
    pairs = largest[..., 0].numel() * largest[0, ..., 0].numel()
    return STREAMS * largest.nbytes + LOGITS * (heads * pairs * largest.element_size() + whole.logits.nbytes)


def _images_at_once(one: _Whole, memory: int) -> int:
    """How many images' streams and a candidate of each fit into the memory, from those of one image."""
    kept = memory // 2 // sum(stream.nbytes for stream in one.streams)
    return max(1, min(kept, _limit(one, memory) // _in_flight(one, 0)))


def _limit(whole: _Whole, memory: int) -> int:
    return min(memory // 2, CACHE) if whole.logits.device.type == "cpu" else memory // 2
