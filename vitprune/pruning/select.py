"""From scores to masks with exact counts: who competes with whom is the scope."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.constraints import UNCONSTRAINED, Constraints, competing, nearest, rounded, select_in_steps

NO_BOUNDS: Constraints = {}
SCOPES = ("layer", "global", "module", "isomorphic", "head", "N:M")
N_OF_M = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class CandidatePool:
    """Units that compete: the name of each group that takes part with flat indices into it, and how many have to go.

    `kept` has, for each of them, how many may stay; empty where every number may.
    """

    places: tuple[tuple[str, Tensor], ...]
    remove: int
    kept: tuple[range, ...] = ()

    @property
    def stepped(self) -> bool:
        """Whether the units of several groups go in lots of more than one."""
        return len(self.kept) > 1 and any(kept.step > 1 for kept in self.kept)


def select(
    scores: Scores,
    sparsity: float,
    scope: str = "global",
    groups: Sequence[Group] = (),
    previous: Masks | None = None,
    keep_at_least: int = 0,
    bounds: Constraints = NO_BOUNDS,
) -> Masks:
    """Remove the units of least score: exactly round(sparsity * units) of every pool that competes.

    Ties go in order of position (group by group, lower index first). Scopes: `layer` (each group alone), `global`
    (all together), `module` (all groups of one pool name), `isomorphic` (all groups of one structure), `head` (each
    row of a (heads, channels) group alone), `N:M` (N of every M consecutive input channels of a row stay). `module` and
    `isomorphic` read `groups`. Units that `previous` has removed stay removed and count as removed;
    `keep_at_least` protects that many best units of every group (of every row under `head`), even where the count
    would take them.

    `bounds` hold for single groups. One whose share is said has exactly that, and the sparsity is that of the others;
    the least and the most that may go of a group are kept while the pool's count is, as far as they allow it. A
    multiple: as if the line between what stays and what goes were moved along the pool's order, each group's count
    above it rounded to the nearest multiple, until the total is as near as it gets to the asked one (of two equally
    near the larger). So a larger sparsity removes more, and never other units. At least one multiple stays; a group
    with fewer units stays whole, and at a sparsity of 0 so do all. Under `head` a bound is of each row.

    Raises:
        BadInput: sparsity is outside 0..1, a score is NaN, a scope is unknown or does not fit a group's shape, or N:M
            is to keep bounds other than that nothing goes.

    Source: UP-ViTs (the same share in each group, stable order), DIMAP (one threshold per module).
    """
    _refuse_outside(sparsity)
    ranked = {name: _ranked(name, score, previous, keep_at_least) for name, score in scores.items()}
    pattern = pattern_of(scope)
    if pattern:
        masks = {name: _n_of_m(name, s, *pattern, sparsity, bounds) for name, s in ranked.items()}
    else:
        masks = _settled(ranked, candidate_pools(scores, sparsity, scope, groups, previous, keep_at_least, bounds))
    if previous is not None:
        masks = {name: mask & previous[name].view(mask.shape) for name, mask in masks.items()}
    return masks


def select_blocks(scores: Scores, sparsity: float, previous: Masks | None = None) -> Masks:
    """Remove pairs of neighbouring sub-layers, exactly round(sparsity * blocks) of each group, but never the last one.

    The score of a sub-layer is that of its pair with the next one that is left; of equal pairs the first goes. A
    removal forms a new pair, which nobody has scored: it goes where no other is left, so score again after each.

    Raises:
        BadInput: sparsity is outside 0..1, or a score is NaN.

    Source: UP-ViTs, progressive block pruning.
    """
    _refuse_outside(sparsity)
    masks: Masks = {}
    for name, score in scores.items():
        mask = torch.ones(score.shape, dtype=torch.bool) if previous is None else previous[name].clone()
        blocks = score.numel() // 2
        keep = 2 * (blocks - blocks_removed(sparsity, blocks))
        _remove_pairs(_ranked(name, score, None, 0).tolist(), mask, keep)
        masks[name] = mask
    return masks


def blocks_removed(sparsity: float, blocks: int) -> int:
    """How many of so many blocks a sparsity removes; one always stays."""
    return min(rounded(sparsity * blocks), blocks - 1)


def _remove_pairs(ranked: list[float], mask: Tensor, keep: int) -> None:
    left = mask.nonzero().flatten().tolist()
    while len(left) > keep:
        worths = [ranked[unit] for unit in left[:-1]]
        at = worths.index(min(worths))
        mask[left[at : at + 2]] = False
        if at > 0:  # its next one is another now
            ranked[left[at - 1]] = float("inf")
        del left[at : at + 2]


def candidate_pools(
    scores: Scores,
    sparsity: float,
    scope: str = "global",
    groups: Sequence[Group] = (),
    previous: Masks | None = None,
    keep_at_least: int = 0,
    bounds: Constraints = NO_BOUNDS,
) -> list[CandidatePool]:
    """Who competes in `select`, of the units that are still there, and how many of them have to go.

    Of the scores only names and shapes count. Where the groups of a pool keep multiples, the number is the asked one,
    and the scores say which multiples come nearest.

    Raises:
        BadInput: a scope is unknown or does not fit a group's shape, or it is N:M, which has a contest per few weights.
    """
    if scope == "head":
        pools = [[(name, row)] for name, score in scores.items() for row in _rows(name, score)]
    else:
        named = [pool for names in _pools(scores, scope, groups).values() for pool in competing(bounds, names)]
        pools = [[(name, torch.arange(scores[name].numel())) for name in names] for names in named]
    return [_contest(pool, sparsity, previous, keep_at_least, bounds) for pool in pools]


def _contest(
    pool: Sequence[tuple[str, Tensor]], sparsity: float, previous: Masks | None, keep_at_least: int, bounds: Constraints
) -> CandidatePool:
    """What is gone counts as removed, no group loses its last protected units, and every group keeps its bounds."""
    if previous is None:
        living = list(pool)
    else:
        living = [(name, places[previous[name].flatten().cpu()[places]]) for name, places in pool]
    kept = []
    for (name, places), (_, there) in zip(pool, living, strict=True):
        own = bounds.get(name, UNCONSTRAINED)
        own = own if sparsity or own.min_sparsity else replace(own, multiple=1)
        kept.append(own.kept(len(places), len(there), keep_at_least))
    units, left = (sum(len(places) for _, places in those) for those in (pool, living))
    stay = units - rounded(sparsity * units)
    stay = max(min(stay, sum(one[-1] for one in kept)), sum(one[0] for one in kept))
    if len(kept) == 1:
        stay = nearest(kept[0], stay)
    return CandidatePool(tuple(living), left - stay, tuple(kept) if bounds else ())


def _settled(ranked: Scores, fields: Sequence[CandidatePool]) -> Masks:
    """The best of each contest stay; what takes part in none is gone."""
    masks = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in ranked.items()}
    for contest in fields:
        own = [ranked[name].flatten()[_all_or(places, ranked[name])] for name, places in contest.places]
        if contest.stepped:
            stay = select_in_steps([_finite(flat).sort().values.tolist() for flat in own], contest.kept, contest.remove)
            pieces = [_keep_best(flat, keep) for flat, keep in zip(own, stay, strict=True)]
        else:
            flat = torch.cat([_bounded(*pair) for pair in zip(own, contest.kept, strict=True)] if contest.kept else own)
            pieces = list(torch.split(_keep_best(flat, len(flat) - contest.remove), [len(one) for one in own]))
        for (name, places), piece in zip(contest.places, pieces, strict=True):
            masks[name].view(-1)[_all_or(places, masks[name])] = piece
    return masks


def _all_or(places: Tensor, of: Tensor) -> Tensor | slice:
    """Rising places as an index; if they are all, one that costs nothing."""
    return slice(None) if len(places) == of.numel() else places


def _bounded(flat: Tensor, kept: range) -> Tensor:
    """Scores as they compete: what must go, for the group's bounds, is -inf, and what must stay +inf."""
    if not kept[0] and kept[-1] == len(flat):
        return _finite(flat)
    order, flat = flat.argsort(stable=True), _finite(flat)
    flat[order[: len(flat) - kept[-1]]] = -torch.inf
    flat[order[len(flat) - kept[0] :]] = torch.inf
    return flat


def _finite(flat: Tensor) -> Tensor:
    return flat.nan_to_num(posinf=torch.finfo(flat.dtype).max, neginf=torch.finfo(flat.dtype).min)


def sparsity_of(scope: str) -> float | None:
    """Fraction that an N:M scope removes, or None where the sparsity is free.

    Raises:
        BadInput: N is not between 1 and M - 1.
    """
    pattern = pattern_of(scope)
    return 1 - _stay(*pattern) if pattern else None


def pattern_of(scope: str) -> tuple[int, int] | None:
    """N and M of a scope N:M, None for any other."""
    found = N_OF_M.fullmatch(scope)
    return (int(found[1]), int(found[2])) if found else None


def _stay(n: int, m: int) -> float:
    if not 0 < n < m:
        raise BadInput(f"scope '{n}:{m}': N of M weights stay, so N must be between 1 and M - 1")
    return n / m


def _refuse_outside(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise BadInput(f"sparsity {sparsity}: must be at least 0 and below 1 (the fraction to remove)")


def _ranked(name: str, score: Tensor, previous: Masks | None, keep_at_least: int) -> Tensor:
    """Scores as they compete: what is gone is -inf, what is protected is +inf."""
    if bool(score.isnan().any()):
        raise BadInput(f"{name}: {int(score.isnan().sum())} scores are NaN; check the model's weights and the images")
    ranked = score.detach().to("cpu", torch.float64, copy=previous is not None or keep_at_least > 0)
    if previous is not None:
        ranked[~previous[name].view(ranked.shape)] = -torch.inf
    if keep_at_least:
        best = ranked.flatten().argsort(descending=True, stable=True)[:keep_at_least]
        ranked.view(-1)[best] = torch.inf
    return ranked


def _keep_best(flat: Tensor, keep: int) -> Tensor:
    """Bool vector with exactly `keep` True at the largest scores; of equal scores the later positions stay."""
    remove = flat.numel() - keep
    if remove == 0:
        return torch.ones_like(flat, dtype=torch.bool)
    threshold = float(np.partition(flat.numpy(), remove - 1)[remove - 1])  # kthvalue is several times slower
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[remove - int((flat < threshold).sum()) :]] = True
    return mask


def _pools(scores: Scores, scope: str, groups: Sequence[Group]) -> dict[object, list[str]]:
    if scope == "layer":
        return {name: [name] for name in scores}
    if scope == "global":
        return {scope: list(scores)}
    if scope not in ("module", "isomorphic"):
        raise BadInput(f"scope {scope!r}: unknown; use one of {', '.join(SCOPES)} (as in 2:4)")
    by_name = {group.name: group for group in groups}
    missing = [name for name in scores if name not in by_name]
    if missing:
        raise BadInput(f"scope {scope!r}: needs groups=, which lacks {missing[0]}")
    pools: dict[object, list[str]] = defaultdict(list)
    for name in scores:
        pools[by_name[name].layer_type if scope == "module" else _structure(by_name[name])].append(name)
    return pools


def _structure(group: Group) -> tuple[object, ...]:
    """What isomorphic groups share: kind and the addresses of their slices without block numbers."""
    return (group.kind, *(replace(part, param=re.sub(r"\.\d+\.", ".#.", part.param)) for part in group.slices))


def _rows(name: str, score: Tensor) -> Tensor:
    if score.dim() != 2:
        raise BadInput(f"{name}: scope 'head' needs scores of shape (heads, channels), these are {list(score.shape)}")
    return torch.arange(score.numel()).view(score.shape)


def _n_of_m(name: str, score: Tensor, n: int, m: int, sparsity: float, bounds: Constraints) -> Tensor:
    implied = 1 - _stay(n, m)
    if bounds.get(name, UNCONSTRAINED).max_sparsity == 0:
        return torch.ones(score.shape, dtype=torch.bool)
    if bounds.get(name, UNCONSTRAINED) != UNCONSTRAINED:
        raise BadInput(f"{name}: scope '{n}:{m}' removes {implied:g} of every layer; a rule can only ignore one")
    if abs(sparsity - implied) > 1e-9:
        raise BadInput(f"scope '{n}:{m}': removes {implied:g}, but sparsity is {sparsity:g}; set it to {implied:g}")
    # A run lies along the input channels, for a k x k kernel at one of its positions: a sparse matrix unit multiplies
    # the kernel as k * k matrices (or as one of k * k * d_in columns, channels last), never neighbouring positions.
    inputs_last = score.movedim(1, -1)  # (d_out, [k, k,] d_in)
    if score.shape[1] % m:
        raise BadInput(f"{name}: rows of {score.shape[1]} weights cannot be divided into runs of {m}; leave it out")
    runs = inputs_last.reshape(-1, m)
    order = runs.argsort(dim=1, stable=True)  # ascending: the first m - n go
    mask = torch.ones_like(runs, dtype=torch.bool).scatter(1, order[:, : m - n], False)
    return mask.view(inputs_last.shape).movedim(-1, 1).contiguous()
