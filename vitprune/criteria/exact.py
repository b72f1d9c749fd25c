"""UP-ViTs' criterion, exactly, from what the whole model has computed: only what a removal changes is run again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.chain import Branch, Chain
from vitprune.criteria import Batches, Importance, Setting
from vitprune.criteria.kl import without
from vitprune.criteria.narrow import narrowed
from vitprune.criteria.passes import needed, onwards, prefixes
from vitprune.criteria.products import full_precision, keep_freed_memory
from vitprune.criteria.removals import Around, remover
from vitprune.errors import BadInput
from vitprune.families.chains import chain as chain_of
from vitprune.groups import Group
from vitprune.modes import evaluating
from vitprune.progress import track

KINDS = ("residual", "attention", "head", "ffn", "block")
STREAMS = 20  # activations of a branch in flight, in streams of its size
CACHE = 16 << 20  # bytes; on a CPU, candidates that fall out of the processor's cache are slower


def exact(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: Setting) -> Importance:
    """Score a unit by sum over images of KL(model || model without it): the numbers of kl.literal, sooner.

    A float64 model is scored in float64 throughout. A float32 model runs in float32, its divergences are taken in
    float64 of float32 logits: those carry rounding of about 1e-6, so a score below some 1e-9 nats per image is noise.

    Raises:
        BadInput: there are no images, or the model or a group is not understood; it is named.

    Source: UP-ViTs equation 1.
    """
    if not batches:
        raise BadInput("kl: needs images; give batches")
    everything = {group.name: torch.arange(group.candidates) for group in groups}
    scores = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    for group in groups:
        scores[group.name][group.candidates :] = torch.inf
    for images, _ in track(batches, "scoring units, batch by batch"):
        for name, found in divergences(model, groups, everything, images, setting).items():
            scores[name][: len(found)] += found.sum(1)
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def divergences(
    model: nn.Module, groups: Sequence[Group], chosen: Mapping[str, Tensor], images: Tensor, setting: Setting
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
        size = _images_at_once(chain, images[:1].to(device), setting)
        runs = _runs(model, chain, jobs, images, size, setting, found)
        effort = sum(len(units) * _depth(chain, group) for group, units in jobs) * -(-len(images) // size)
        for _ in track(runs, "removing units", total=effort):
            pass
    return found


@dataclass(frozen=True)
class _Teacher:
    """What the whole model makes of some images: every step's input stream and the logits."""

    images: Tensor
    streams: list[Tensor]
    logits: Tensor


def _check(chain: Chain, group: Group, units: Tensor) -> None:
    if group.kind not in KINDS:
        raise BadInput(f"{group.name}: exact scoring removes {', '.join(KINDS)}, not kind {group.kind!r}")
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


def _runs(
    model: nn.Module,
    chain: Chain,
    jobs: Sequence[tuple[Group, Tensor]],
    images: Tensor,
    size: int,
    setting: Setting,
    found: dict[str, Tensor],
) -> Iterator[None]:
    """Fill `found`, some images and some candidates at a time; yields once per step that a candidate has run."""
    device = next(model.parameters()).device
    for first in range(0, len(images), size):
        some = images[first : first + size].to(device)
        streams = prefixes(chain, some)
        teacher = _Teacher(some, streams, chain.finish(streams[-1]).double())
        for group, units in (job for job in jobs if len(job[1])):
            done = 0
            for part in _answers(model, chain, group, units, teacher, setting):
                rows = slice(done, done + len(part))
                found[group.name][rows, first : first + size] = part.cpu()
                done += len(part)
                yield from [None] * (len(part) * _depth(chain, group))


def _answers(
    model: nn.Module, chain: Chain, group: Group, units: Tensor, teacher: _Teacher, setting: Setting
) -> Iterator[Tensor]:
    """Divergences of the units, some at a time; (C, B)."""
    device = teacher.images.device
    if group.kind == "residual":
        count = _candidates(teacher.streams, 0, setting) if chain.narrow else 1
        for some in torch.split(units, count):
            if chain.narrow:
                candidates = narrowed(chain, some.to(device), len(teacher.images))
                logits = onwards(candidates, 0, candidates.embed(teacher.streams[0]))
            else:
                logits = without(model, group, int(some))(teacher.images)
            yield _divergence(teacher.logits, logits)
        return
    if group.kind == "block":
        for unit in units.tolist():  # two neighbouring branches are left out
            start = chain.branch(group.sublayers[unit][0]) or 0
            yield _divergence(teacher.logits, onwards(chain, start + 2, teacher.streams[start]))
        return
    place = _place(chain, group)
    branch = chain.steps[place]
    assert isinstance(branch, Branch)
    around = Around(branch, teacher.streams[place], teacher.streams[place + 1], needed(chain, place))
    removed = remover(model, group, around)
    for some in torch.split(units, _candidates(teacher.streams, place, setting)):
        logits = onwards(chain, place + 1, removed(some).flatten(0, 1))
        yield _divergence(teacher.logits, logits)


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


def _candidates(streams: Sequence[Tensor], place: int, setting: Setting) -> int:
    """How many candidates of all images fit into the memory at once, from the largest stream that they still run."""
    largest = max(stream.nbytes for stream in streams[place + 1 :])
    return max(1, _limit(streams[0].device, setting) // (STREAMS * largest))


def _images_at_once(chain: Chain, image: Tensor, setting: Setting) -> int:
    """How many images' streams and one candidate of each fit into the memory."""
    streams = prefixes(chain, image)
    largest = max(stream.nbytes for stream in streams)
    kept = (setting.memory // 2) // sum(stream.nbytes for stream in streams)
    return max(1, min(kept, _limit(image.device, setting) // (STREAMS * largest)))


def _limit(device: torch.device, setting: Setting) -> int:
    limit = setting.memory // 2
    return min(limit, CACHE) if device.type == "cpu" else limit
