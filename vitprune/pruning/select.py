"""Select masks from scores with exact counts; the scope decides which units are ranked together."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import SupportsFloat

import numpy as np
import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.constraints import UNCONSTRAINED, Constraints, competing, nearest, rounded, select_in_steps
from vitprune.runtime.arguments import check_arguments

NO_BOUNDS: Constraints = {}
SCOPES = ("layer", "global", "module", "isomorphic", "head", "N:M")
N_OF_M = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class CandidatePool:
    """Units that are ranked together.

    Attributes:
        members: Name of each group in the pool, and flat indices of its units.
        remove: Number of units to remove.
        kept: Numbers of units that may remain, per group; empty if every number may.
    """

    members: tuple[tuple[str, Tensor], ...]
    remove: int
    kept: tuple[range, ...] = ()

    @property
    def in_steps(self) -> bool:
        """Whether units of several groups are removed in steps of more than one unit."""
        return len(self.kept) > 1 and any(kept.step > 1 for kept in self.kept)


@check_arguments()
def select(
    scores: Scores,
    sparsity: float,
    scope: str = "global",
    groups: Sequence[Group] = (),
    previous: Masks | None = None,
    keep_at_least: int = 0,
    bounds: Constraints = NO_BOUNDS,
) -> Masks:
    """Remove the units with the lowest scores: exactly round(sparsity * units) of every candidate pool.

    Of equal scores, units of earlier groups and with lower indices are removed first. A larger sparsity removes a
    superset of the units.

    Args:
        scores: Scores by group.
        sparsity: Fraction of the units to remove. Fixed sparsities of single groups come in addition.
        scope: Units that are ranked together: `layer` (each group), `global` (all groups), `module` (groups of one
            layer type), `isomorphic` (groups of one structure), `head` (each row of a (heads, channels) group) or `N:M`
            (N of every M consecutive input channels of a row remain).
        groups: The groups, for `module` and `isomorphic`.
        previous: Masks of the cycle before. Units that they remove remain removed, and count as removed.
        keep_at_least: Number of best units that remain in every group (in every row for `head`).
        bounds: Constraints of single groups (of each row for `head`). They take precedence over the pool's number. With
            a multiple, a group's number is rounded to the nearest multiple, and the total is the nearest possible one
            (of two equally near ones the larger). A group with fewer units than its multiple keeps all of them, and so
            do all groups at sparsity 0.

    Raises:
        BadInput: the sparsity is outside 0..1, a score is NaN, the scope is unknown or does not fit the shape of a
            group, N:M is combined with a constraint other than that a group is ignored, or a mask of `previous` is
            missing or of another type or size.

    Source: UP-ViTs (the same sparsity in each group, stable order), DIMAP (one threshold per module).
    """
    _refuse_outside(sparsity)
    previous = None if previous is None else {name: _previous(name, scores[name], previous) for name in scores}
    ranked = {name: _ranked(name, score, previous, keep_at_least) for name, score in scores.items()}
    pattern = pattern_of(scope)
    if pattern:
        masks = {name: _n_of_m(name, s, *pattern, sparsity, bounds) for name, s in ranked.items()}
    else:
        pools = candidate_pools(scores, sparsity, scope, groups, previous, keep_at_least, bounds)
        masks = _select_from_pools(ranked, pools)
    if previous is not None:
        masks = {name: mask & previous[name].view(mask.shape) for name, mask in masks.items()}
    return masks


def select_blocks(scores: Scores, sparsity: float, previous: Masks | None = None) -> Masks:
    """Remove pairs of neighboring sub-layers: exactly round(sparsity * blocks) pairs of each group, never all.

    The score of a sub-layer is that of its pair with the next remaining one; of equal scores the first pair is removed.
    A removal forms a new pair without a score, which is removed only if no other pair remains. Therefore compute the
    scores again after each removal.

    Raises:
        BadInput: the sparsity is outside 0..1, or a score is NaN.

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
    """Return the number of blocks that a sparsity removes; at least one block remains."""
    return min(rounded(sparsity * blocks), blocks - 1)


def _remove_pairs(ranked: list[float], mask: Tensor, keep: int) -> None:
    left = mask.nonzero().flatten().tolist()
    while len(left) > keep:
        at = min(range(len(left) - 1), key=lambda index: ranked[left[index]])
        mask[left[at : at + 2]] = False
        if at > 0:  # this sub-layer forms a new pair, which has no score
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
    """Return the pools of remaining units that `select` ranks together, and the number that it removes from each.

    The arguments are those of `select`; only names and shapes of the scores are used. If groups of a pool keep
    multiples, `select` removes the nearest possible number.

    Raises:
        BadInput: the scope is unknown, does not fit the shape of a group, or is N:M.
    """
    if scope == "head":
        pools = [[(name, row)] for name, score in scores.items() for row in _rows(name, score)]
    else:
        named = [pool for names in _pools(scores, scope, groups).values() for pool in competing(bounds, names)]
        pools = [[(name, torch.arange(scores[name].numel())) for name in names] for names in named]
    return [_candidate_pool(pool, sparsity, previous, keep_at_least, bounds) for pool in pools]


def _candidate_pool(
    pool: Sequence[tuple[str, Tensor]], sparsity: float, previous: Masks | None, keep_at_least: int, bounds: Constraints
) -> CandidatePool:
    """Return a pool without the units removed before; `remove` respects protected units and constraints."""
    if previous is None:
        members = list(pool)
    else:
        members = [(name, units[previous[name].flatten().cpu()[units]]) for name, units in pool]
    kept = []
    for (name, units), (_, left) in zip(pool, members, strict=True):
        constraint = bounds.get(name, UNCONSTRAINED)
        constraint = constraint if sparsity or constraint.min_sparsity else replace(constraint, multiple=1)
        kept.append(constraint.kept(len(units), len(left), keep_at_least))
    total, remaining = (sum(len(units) for _, units in part) for part in (pool, members))
    keep = total - rounded(sparsity * total)
    keep = max(min(keep, sum(numbers[-1] for numbers in kept)), sum(numbers[0] for numbers in kept))
    if len(kept) == 1:
        keep = nearest(kept[0], keep)
    return CandidatePool(tuple(members), remaining - keep, tuple(kept) if bounds else ())


def _select_from_pools(ranked: Scores, pools: Sequence[CandidatePool]) -> Masks:
    """Keep the best units of each pool; units in no pool have been removed before."""
    masks = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in ranked.items()}
    for pool in pools:
        scores = [ranked[name].flatten()[_index(units, ranked[name])] for name, units in pool.members]
        if pool.in_steps:
            keep = select_in_steps([_finite(flat).sort().values.tolist() for flat in scores], pool.kept, pool.remove)
            parts = [_keep_best(flat, number) for flat, number in zip(scores, keep, strict=True)]
        else:
            bounded = [_bounded(*pair) for pair in zip(scores, pool.kept, strict=True)] if pool.kept else scores
            flat = torch.cat(bounded)
            parts = list(torch.split(_keep_best(flat, len(flat) - pool.remove), [len(part) for part in scores]))
        for (name, units), part in zip(pool.members, parts, strict=True):
            masks[name].view(-1)[_index(units, masks[name])] = part
    return masks


def _index(units: Tensor, values: Tensor) -> Tensor | slice:
    """Return ascending indices, or a slice (which needs no copy) if they are all indices."""
    return slice(None) if len(units) == values.numel() else units


def _bounded(flat: Tensor, kept: range) -> Tensor:
    """Set the scores of units that the group's constraint removes to -inf, and of those that it keeps to +inf."""
    if not kept[0] and kept[-1] == len(flat):
        return _finite(flat)
    order, flat = flat.argsort(stable=True), _finite(flat)
    flat[order[: len(flat) - kept[-1]]] = -torch.inf
    flat[order[len(flat) - kept[0] :]] = torch.inf
    return flat


def _finite(flat: Tensor) -> Tensor:
    return flat.nan_to_num(posinf=torch.finfo(flat.dtype).max, neginf=torch.finfo(flat.dtype).min)


def sparsity_of(scope: str) -> float | None:
    """Return the fraction that an N:M scope removes; None for other scopes, whose sparsity is a setting.

    Raises:
        BadInput: N is not between 1 and M - 1.
    """
    pattern = pattern_of(scope)
    return 1 - _kept_fraction(*pattern) if pattern else None


def pattern_of(scope: str) -> tuple[int, int] | None:
    """Return N and M of a scope N:M, None for any other."""
    match = N_OF_M.fullmatch(scope)
    return (int(match[1]), int(match[2])) if match else None


def _kept_fraction(n: int, m: int) -> float:
    if not 0 < n < m:
        raise BadInput(f"scope '{n}:{m}': N of M weights remain, so N must be between 1 and M - 1")
    return n / m


def _refuse_outside(sparsity: float) -> None:
    if not isinstance(sparsity, SupportsFloat) or not 0 <= float(sparsity) < 1:
        raise BadInput(f"sparsity {sparsity}: must be at least 0 and below 1 (the fraction to remove)")


def _previous(name: str, score: Tensor, previous: Masks) -> Tensor:
    """Return the mask of the cycle before in the shape of the scores, on the CPU."""
    mask = previous.get(name)
    if mask is None or mask.dtype != torch.bool or mask.numel() != score.numel():
        found = "has no mask" if mask is None else f"its mask is {mask.dtype} {list(mask.shape)}"
        raise BadInput(f"previous: {name}: {found}; give torch.bool {list(score.shape)}")
    return mask.cpu().view(score.shape)


def _ranked(name: str, score: Tensor, previous: Masks | None, keep_at_least: int) -> Tensor:
    """Return scores as float64 with removed units at -inf and protected units at +inf."""
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
    """Return a mask of exactly the `keep` largest scores; of equal scores the later ones are kept."""
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
    """Return what isomorphic groups share: kind and parameter slices without block numbers."""
    return (group.kind, *(replace(part, param=re.sub(r"\.\d+\.", ".#.", part.param)) for part in group.slices))


def _rows(name: str, score: Tensor) -> Tensor:
    if score.dim() != 2:
        raise BadInput(f"{name}: scope 'head' needs scores of shape (heads, channels), these are {list(score.shape)}")
    return torch.arange(score.numel()).view(score.shape)


def _n_of_m(name: str, score: Tensor, n: int, m: int, sparsity: float, bounds: Constraints) -> Tensor:
    implied = 1 - _kept_fraction(n, m)
    if bounds.get(name, UNCONSTRAINED).max_sparsity == 0:
        return torch.ones(score.shape, dtype=torch.bool)
    if bounds.get(name, UNCONSTRAINED) != UNCONSTRAINED:
        raise BadInput(f"{name}: scope '{n}:{m}' removes {implied:g} of every layer; a rule can only ignore one")
    if abs(sparsity - implied) > 1e-9:
        raise BadInput(f"scope '{n}:{m}': removes {implied:g}, but sparsity is {sparsity:g}; set it to {implied:g}")
    if score.dim() < 2:
        shape = f"needs scores of weights (outputs, inputs, ...), these are {list(score.shape)}"
        raise BadInput(f"{name}: scope '{n}:{m}' {shape}; exclude it by a rule")
    # A run is along the input channels, at one position of a k x k kernel: sparse matrix units multiply the kernel as
    # k * k matrices (or as one with k * k * d_in columns, channels last), so neighboring positions are never in a run.
    inputs_last = score.movedim(1, -1)  # (d_out, [k, k,] d_in)
    if score.shape[1] % m:
        why = f"rows of {score.shape[1]} weights cannot be divided into runs of {m}"
        raise BadInput(f"{name}: {why}; exclude it by a rule")
    runs = inputs_last.reshape(-1, m)
    order = runs.argsort(dim=1, stable=True)  # ascending: the first m - n are removed
    mask = torch.ones_like(runs, dtype=torch.bool).scatter(1, order[:, : m - n], False)
    return mask.view(inputs_last.shape).movedim(-1, 1).contiguous()
