"""UP-ViTs' kept set at a fraction of its cost: surrogate scores for all, exact ones where a place is at stake."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, ScoringContext
from vitprune.criteria.kl.exact import kl_divergences
from vitprune.criteria.kl.fisher import fisher_kl_per_image
from vitprune.errors import BadInput
from vitprune.groups import Group, Scores
from vitprune.pruning.rescoring_posterior import Doubt, ScorePosterior, doubt, doubtful, heavy_tailed, pools
from vitprune.pruning.select import CandidatePool

DRAWS = 200  # from the posterior, to see how often the kept set would be another
FIRST_IMAGES = 8  # of a unit in its first round; each round after doubles them
SPARE = 2  # the errors left alone in a round are so many times fewer than those allowed

SAMPLE = 8  # units of a group that are measured first
CHUNK = 64  # images at a time

Exact = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]  # (units by group, images) -> (units, images)
Control = Callable[[Tensor], Tensor]  # images -> (all units, images)


@dataclass(frozen=True)
class Rescored:
    """Scores from which `select` takes the settled kept set, and figures about how they came about."""

    scores: Scores
    facts: dict[str, float]


RescoreFn = Callable[[nn.Module, Sequence[Group], Batches, Scores, Sequence[CandidatePool], ScoringContext], Rescored]


def rescore(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    scores: Scores,
    contests: Sequence[CandidatePool],
    context: ScoringContext,
) -> Rescored:
    """Measure exact scores of the units whose place in a contest is in doubt, until the kept set is settled.

    `scores` are Fisher's of all units over the same images and with the same seed: their parts, image by image, are the
    control variate. A kind of units is settled when the expected share of its kept units that the exact scores would
    keep is at least `config.confidence`. Images are taken in one random order, without replacement, so that what
    is measured on all of them is exact.

    Raises:
        BadInput: no batches, or the model or a group is not understood.
    """
    if not batches:
        raise BadInput("upvits: needs images; give batches")
    images = [image for batch, _ in batches for image in batch]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(context.seed))
    names = list(scores)
    own = [group for group in groups if group.name in scores]

    def exact(chosen: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        return kl_divergences(model, own, chosen, torch.stack([images[place] for place in places.tolist()]), context)

    def control(places: Tensor) -> Tensor:
        some = torch.stack([images[place] for place in places.tolist()])
        found = fisher_kl_per_image(model, own, some, context, [context.first + place for place in places.tolist()])
        return torch.cat([found[name] for name in names])

    units = sum(score.numel() for score in scores.values())
    affordable = units * len(images) * 4 <= context.config.memory
    kinds = {group.name: group.kind for group in own}
    return adaptive_rescoring(scores, kinds, contests, exact, control if affordable else None, order, context)


def adaptive_rescoring(
    scores: Scores,
    kinds: Mapping[str, str],
    contests: Sequence[CandidatePool],
    exact: Exact,
    control: Control | None,
    order: Tensor,
    context: ScoringContext,
) -> Rescored:
    """The race itself: `exact` and `control` give values of units on images, in the order given.

    In each round, every kind not yet settled sends its units most in doubt to more images, twice as many as before.

    Source: racing (Maron & Moore 1994) on the ratio to a control variate. It stops at an expected overlap, not when all
    pairs are apart: two nearly equal units take the most images to tell apart, and it matters least which one goes. Of
    equal doubts the one that is cheaper to clear, in the later layers, is cleared first.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    flat = [_flat(sizes, contest) for contest in contests]
    removals = [contest.remove for contest in contests]
    field = _Field(sizes, flat, removals, [kinds[contest.places[0][0]] for contest in contests], kinds)
    surrogate = torch.cat([score.flatten().to("cpu", torch.float64) for score in scores.values()])
    state = ScorePosterior(surrogate, pools(list(sizes.values())), len(order))
    controls = _Controls(control, order, surrogate)
    rounds, sent = 0, field.sample(context)
    while len(sent):
        rounds += 1
        for begin, end, last, units in _stages(state, sent):
            found = exact(field.by_group(units), order[begin:end])
            measured = torch.cat([found[name] for name in field.by_group(units)])
            needed = torch.zeros_like(measured) if last else controls.of(units, begin, end)
            state.add(units, measured, needed)
        sent = field.sent(state, field.doubts(state, context), context)
    values = torch.split(state.scores(), list(sizes.values()))
    settled = {name: value.view(scores[name].shape) for name, value in zip(scores, values, strict=True)}
    return Rescored(settled, _facts(state, field.doubts(state, context), field, rounds, context))


@dataclass(frozen=True)
class _Field:
    """All units in a row, group by group, and which of them compete."""

    sizes: dict[str, int]
    contests: list[Tensor]  # of units, by their places in the row
    remove: list[int]
    kinds: list[str]
    of: Mapping[str, str]  # kind of each group

    def doubts(self, state: ScorePosterior, context: ScoringContext) -> list[Doubt]:
        mean, deviation = state.posterior()
        found = []
        for number, (units, remove) in enumerate(zip(self.contests, self.remove, strict=True)):
            source = torch.Generator().manual_seed(context.seed + number)
            draws = heavy_tailed((DRAWS, len(units)), source)
            found.append(doubt(mean[units], deviation[units], remove, draws))
        return found

    def sample(self, context: ScoringContext) -> Tensor:
        """Some units of every group that competes, drawn at random: what the ratios of its pool are guessed from."""
        source = torch.Generator().manual_seed(context.seed)
        competing = torch.cat([units for units, remove in zip(self.contests, self.remove, strict=True) if remove])
        pieces = torch.split(torch.arange(sum(self.sizes.values())), list(self.sizes.values()))
        drawn = [piece[torch.randperm(len(piece), generator=source)[:SAMPLE]] for piece in pieces]
        found = torch.cat(drawn)
        return found[torch.isin(found, competing)].sort().values

    def sent(self, state: ScorePosterior, doubts: Sequence[Doubt], context: ScoringContext) -> Tensor:
        """Units to measure on more images, ascending; none where every kind is settled, or all of it is measured."""
        sent = [torch.empty(0, dtype=torch.int64)]
        for kind in sorted(set(self.kinds)):
            own = [number for number, other in enumerate(self.kinds) if other == kind]
            if self.overlap(doubts, own) >= context.config.confidence:
                continue
            units = torch.cat([self.contests[number] for number in own])
            wrong = torch.cat([doubts[number].wrong for number in own])
            able = state.seen[units] < state.images
            effort = self.effort(kind)[units]
            chosen = doubtful(wrong, able, effort, (1 - context.config.confidence) * self.kept(own) / SPARE)
            if not len(chosen):  # what is in doubt is measured, but not what it is compared with
                chosen = doubtful(wrong, able, effort, 0.0)
            sent.append(units[chosen])
        return torch.cat(sent).sort().values

    def effort(self, kind: str) -> Tensor:
        """What a measurement of each unit costs: the share of the kind's layers that have to run again."""
        own = [name for name in self.sizes if self.of[name] == kind]
        steps = {name: (len(own) - number) / len(own) for number, name in enumerate(own)}
        return torch.cat([torch.full((size,), steps.get(name, 1.0)) for name, size in self.sizes.items()])

    def kept(self, contests: Sequence[int]) -> int:
        """How many units of some contests stay."""
        return sum(len(self.contests[number]) - self.remove[number] for number in contests)

    def overlap(self, doubts: Sequence[Doubt], contests: Sequence[int]) -> float:
        """Expected share of the units which stay in some contests that the exact scores would keep."""
        right = sum(doubts[number].overlap * self.kept([number]) for number in contests)
        return right / max(1, self.kept(contests))

    def by_group(self, units: Tensor) -> dict[str, Tensor]:
        """Places inside their groups of units in ascending order."""
        chosen, start = {}, 0
        for name, size in self.sizes.items():
            own = units[(units >= start) & (units < start + size)] - start
            if len(own):
                chosen[name] = own
            start += size
        return chosen


class _Controls:
    """The surrogate's values of all units on the first images of the order, each image's taken once."""

    def __init__(self, control: Control | None, order: Tensor, surrogate: Tensor) -> None:
        self.control, self.order, self.surrogate = control, order, surrogate
        self.values = torch.empty(len(surrogate), 0, dtype=torch.float32)

    def of(self, units: Tensor, begin: int, end: int) -> Tensor:
        """Values of some units (units, images); without a control, equal shares of their totals."""
        if self.control is None:
            return (self.surrogate[units, None] / len(self.order)).expand(-1, end - begin)
        done = self.values.shape[1]
        if end > done:
            self.values = torch.cat([self.values, self.control(self.order[done:end]).float()], dim=1)
        return self.values[units, begin:end].double()


def _flat(sizes: Mapping[str, int], contest: CandidatePool) -> Tensor:
    starts = dict(zip(sizes, [0, *accumulate(sizes.values())], strict=False))
    return torch.cat([starts[name] + places for name, places in contest.places])


def _stages(state: ScorePosterior, sent: Tensor) -> Iterator[tuple[int, int, bool, Tensor]]:
    """Which images units see next, those together that have seen the same: (begin, end, after them all, units)."""
    seen = state.seen[sent]
    for before in sorted(set(seen.tolist())):
        after = min(state.images, max(FIRST_IMAGES, 2 * before))
        for begin in range(before, after, CHUNK):
            # of a score that is exact in the end, the control says nothing
            yield begin, min(after, begin + CHUNK), after == state.images, sent[seen == before]


def _facts(
    state: ScorePosterior, doubts: Sequence[Doubt], field: _Field, rounds: int, context: ScoringContext
) -> dict[str, float]:
    numbers = range(len(doubts))
    by_kind = {kind: [n for n in numbers if field.kinds[n] == kind] for kind in sorted(set(field.kinds))}
    return {
        "confidence": context.config.confidence,
        "contests": float(len(doubts)),
        "evaluations": float(state.seen.sum()),
        "evaluations_share": float(state.seen.sum()) / (len(state.seen) * state.images),
        "expected_overlap": field.overlap(doubts, numbers),
        "images": float(state.images),
        "rescored": float((state.seen > 0).sum()),
        "rounds": float(rounds),
        "units": float(len(state.seen)),
    } | {f"expected_overlap_{kind}": field.overlap(doubts, own) for kind, own in by_kind.items()}
