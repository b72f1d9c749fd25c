"""Adaptive rescoring: Fisher scores for all units, exact KL scores only near the pruning threshold (UP-ViTs)."""

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
from vitprune.pruning.rescoring_posterior import (
    ScorePosterior,
    SelectionErrors,
    heavy_tailed,
    selection_errors,
    units_to_measure,
)
from vitprune.pruning.select import CandidatePool

DRAWS = 200  # from the posterior, to estimate the selection errors
FIRST_IMAGES = 8  # of a unit in its first round; every later round doubles its images
SPARE = 2  # a round ignores units with at most 1 / SPARE of the allowed errors
SAMPLE = 8  # units of a group that are measured first
CHUNK = 64  # images at a time

Exact = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]  # (units by group, images) -> (units, images)
Control = Callable[[Tensor], Tensor]  # images -> (all units, images)


@dataclass(frozen=True)
class Rescored:
    """Scores for `select`, and figures about the rescoring for the metrics."""

    scores: Scores
    facts: dict[str, float]


RescoreFn = Callable[[nn.Module, Sequence[Group], Batches, Scores, Sequence[CandidatePool], ScoringContext], Rescored]


def rescore(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    scores: Scores,
    pools: Sequence[CandidatePool],
    context: ScoringContext,
) -> Rescored:
    """Measure exact scores of the units near the pruning threshold until the selection is accurate enough.

    For every kind, the expected share of kept units that the exact scores would keep as well must be at least
    `config.confidence`. Images are taken in one random order without replacement, so a score that is measured on all
    of them is exact.

    Args:
        model: The model.
        groups: Its groups.
        batches: Calibration batches.
        scores: Fisher scores of all units on the same images and with the same seed; their parts per image are the
            control variate.
        pools: Units that are ranked together, and the number to remove.
        context: The scoring options.

    Raises:
        BadInput: no batches, or the model or a group is not supported.
    """
    if not batches:
        raise BadInput("upvits: needs images; give calibration batches")
    images = [image for batch, _ in batches for image in batch]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(context.seed))
    scored = [group for group in groups if group.name in scores]

    def exact(chosen: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        return kl_divergences(model, scored, chosen, torch.stack([images[i] for i in indices.tolist()]), context)

    def control(indices: Tensor) -> Tensor:
        batch = torch.stack([images[i] for i in indices.tolist()])
        values = fisher_kl_per_image(model, scored, batch, context, [context.first + i for i in indices.tolist()])
        return torch.cat([values[name] for name in scores])

    units = sum(score.numel() for score in scores.values())
    fits = units * len(images) * 4 <= context.config.memory
    kinds = {group.name: group.kind for group in scored}
    return adaptive_rescoring(scores, kinds, pools, exact, control if fits else None, order, context)


def adaptive_rescoring(
    scores: Scores,
    kinds: Mapping[str, str],
    pools: Sequence[CandidatePool],
    exact: Exact,
    control: Control | None,
    order: Tensor,
    context: ScoringContext,
) -> Rescored:
    """Rescore in rounds; every round measures the units with the largest expected errors on twice as many images.

    Args:
        scores: Surrogate scores.
        kinds: Kind of each group.
        pools: Units that are ranked together, and the number to remove.
        exact: Measures exact scores of units on images.
        control: Computes surrogate scores of all units on images; None for equal scores on all images.
        order: Order of the images.
        context: The scoring options.

    Source: racing (Maron & Moore 1994) on the ratio to a control variate. It stops at an expected overlap, not when all
    pairs are distinguished: two nearly equal units take the most images, and a wrong choice among them costs the least.
    Of equal errors, those in later layers are measured first, because this is cheaper.
    """
    sizes = {name: score.numel() for name, score in scores.items()}
    removals = [pool.remove for pool in pools]
    pool_kinds = [kinds[pool.members[0][0]] for pool in pools]
    candidates = _Candidates(sizes, [_flat_indices(sizes, pool) for pool in pools], removals, pool_kinds, kinds)
    surrogate = torch.cat([score.flatten().to("cpu", torch.float64) for score in scores.values()])
    group_of_unit = torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(sizes.values())))
    state = ScorePosterior(surrogate, group_of_unit, len(order))
    controls = _Controls(control, order, surrogate)
    rounds, units = 0, candidates.first_sample(context)
    while len(units):
        rounds += 1
        for begin, end, last, batch in _image_ranges(state, units):
            by_group = candidates.by_group(batch)
            values = exact(by_group, order[begin:end])
            measured = torch.cat([values[name] for name in by_group])
            state.add(batch, measured, torch.zeros_like(measured) if last else controls.of(batch, begin, end))
        units = candidates.next_units(state, candidates.errors(state, context), context)
    parts = torch.split(state.scores(), list(sizes.values()))
    rescored = {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
    return Rescored(rescored, _facts(state, candidates.errors(state, context), candidates, rounds, context))


@dataclass(frozen=True)
class _Candidates:
    """All units, numbered group by group, and the pools in which they are ranked."""

    sizes: dict[str, int]  # units of each group
    pools: list[Tensor]  # units of each pool
    remove: list[int]  # units to remove from each pool
    kinds: list[str]  # of each pool
    kind_of: Mapping[str, str]  # of each group

    def errors(self, state: ScorePosterior, context: ScoringContext) -> list[SelectionErrors]:
        """Estimate the selection errors of each pool."""
        mean, deviation = state.posterior()
        result = []
        for number, (units, remove) in enumerate(zip(self.pools, self.remove, strict=True)):
            draws = heavy_tailed((DRAWS, len(units)), torch.Generator().manual_seed(context.seed + number))
            result.append(selection_errors(mean[units], deviation[units], remove, draws))
        return result

    def first_sample(self, context: ScoringContext) -> Tensor:
        """Draw some units of every group from which units are removed, to fit the prior of its ratios."""
        generator = torch.Generator().manual_seed(context.seed)
        ranked = torch.cat([units for units, remove in zip(self.pools, self.remove, strict=True) if remove])
        parts = torch.split(torch.arange(sum(self.sizes.values())), list(self.sizes.values()))
        drawn = torch.cat([part[torch.randperm(len(part), generator=generator)[:SAMPLE]] for part in parts])
        return drawn[torch.isin(drawn, ranked)].sort().values

    def next_units(self, state: ScorePosterior, errors: Sequence[SelectionErrors], context: ScoringContext) -> Tensor:
        """Return the units to measure on more images, ascending; empty if every kind is accurate enough or exact."""
        result = [torch.empty(0, dtype=torch.int64)]
        for kind in sorted(set(self.kinds)):
            numbers = [number for number, other in enumerate(self.kinds) if other == kind]
            if self.overlap(errors, numbers) >= context.config.confidence:
                continue
            units = torch.cat([self.pools[number] for number in numbers])
            wrong = torch.cat([errors[number].wrong for number in numbers])
            measurable = state.seen[units] < state.images
            effort = self.effort(kind)[units]
            allowed = (1 - context.config.confidence) * self.num_kept(numbers) / SPARE
            chosen = units_to_measure(wrong, measurable, effort, allowed)
            if not len(chosen):  # the units with the largest errors are exact, those next to the threshold are not
                chosen = units_to_measure(wrong, measurable, effort, 0.0)
            result.append(units[chosen])
        return torch.cat(result).sort().values

    def effort(self, kind: str) -> Tensor:
        """Return the cost of measuring each unit: the fraction of the groups of its kind that are computed again."""
        names = [name for name in self.sizes if self.kind_of[name] == kind]
        fractions = {name: (len(names) - number) / len(names) for number, name in enumerate(names)}
        return torch.cat([torch.full((size,), fractions.get(name, 1.0)) for name, size in self.sizes.items()])

    def num_kept(self, numbers: Sequence[int]) -> int:
        """Return the number of units that remain in some pools."""
        return sum(len(self.pools[number]) - self.remove[number] for number in numbers)

    def overlap(self, errors: Sequence[SelectionErrors], numbers: Sequence[int]) -> float:
        """Return the expected share of the kept units of some pools that the exact scores would keep."""
        right = sum(errors[number].overlap * self.num_kept([number]) for number in numbers)
        return right / max(1, self.num_kept(numbers))

    def by_group(self, units: Tensor) -> dict[str, Tensor]:
        """Return the indices within their groups of units in ascending order."""
        result, start = {}, 0
        for name, size in self.sizes.items():
            indices = units[(units >= start) & (units < start + size)] - start
            if len(indices):
                result[name] = indices
            start += size
        return result


class _Controls:
    """Surrogate scores of all units per image, computed once for each image."""

    def __init__(self, control: Control | None, order: Tensor, surrogate: Tensor) -> None:
        self.control, self.order, self.surrogate = control, order, surrogate
        self.values = torch.empty(len(surrogate), 0, dtype=torch.float32)

    def of(self, units: Tensor, begin: int, end: int) -> Tensor:
        """Return the scores of some units, (units, images); without a control, equal parts of their sums."""
        if self.control is None:
            return (self.surrogate[units, None] / len(self.order)).expand(-1, end - begin)
        done = self.values.shape[1]
        if end > done:
            self.values = torch.cat([self.values, self.control(self.order[done:end]).float()], dim=1)
        return self.values[units, begin:end].double()


def _flat_indices(sizes: Mapping[str, int], pool: CandidatePool) -> Tensor:
    starts = dict(zip(sizes, [0, *accumulate(sizes.values())], strict=False))
    return torch.cat([starts[name] + units for name, units in pool.members])


def _image_ranges(state: ScorePosterior, units: Tensor) -> Iterator[tuple[int, int, bool, Tensor]]:
    """Yield begin and end of the next images, whether all images are then measured, and the units to measure."""
    seen = state.seen[units]
    for before in sorted(set(seen.tolist())):
        after = min(state.images, max(FIRST_IMAGES, 2 * before))
        for begin in range(before, after, CHUNK):
            # a score measured on all images is exact and needs no control
            yield begin, min(after, begin + CHUNK), after == state.images, units[seen == before]


def _facts(
    state: ScorePosterior,
    errors: Sequence[SelectionErrors],
    candidates: _Candidates,
    rounds: int,
    context: ScoringContext,
) -> dict[str, float]:
    numbers = range(len(errors))
    by_kind = {kind: [n for n in numbers if candidates.kinds[n] == kind] for kind in sorted(set(candidates.kinds))}
    return {
        "confidence": context.config.confidence,
        "candidate_pools": float(len(errors)),
        "evaluations": float(state.seen.sum()),
        "evaluations_share": float(state.seen.sum()) / (len(state.seen) * state.images),
        "expected_overlap": candidates.overlap(errors, numbers),
        "images": float(state.images),
        "rescored": float((state.seen > 0).sum()),
        "rounds": float(rounds),
        "units": float(len(state.seen)),
    } | {f"expected_overlap_{kind}": candidates.overlap(errors, chosen) for kind, chosen in by_kind.items()}
