"""From scores to masks with exact counts: who competes with whom is the scope."""

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores

SCOPES = ("layer", "global", "module", "isomorphic", "head", "N:M")
N_OF_M = re.compile(r"(\d+):(\d+)")


def select(
    scores: Scores,
    sparsity: float,
    scope: str = "global",
    groups: Sequence[Group] = (),
    previous: Masks | None = None,
    keep_at_least: int = 0,
) -> Masks:
    """Remove the units of least score: exactly round(sparsity * units) of every pool that competes.

    Ties go in order of position (group by group, lower index first). Scopes: `layer` (each group alone), `global`
    (all together), `module` (all groups of one pool name), `isomorphic` (all groups of one structure), `head` (each
    row of a (heads, channels) group alone), `N:M` (N of every M consecutive weights of a row stay). `module` and
    `isomorphic` read `groups`. Units that `previous` has removed stay removed and count as removed;
    `keep_at_least` protects that many best units of every group (of every row under `head`), even where the count
    would take them.

    Raises:
        BadInput: sparsity is outside 0..1, a score is NaN, a scope is unknown or does not fit a group's shape.

    Source: UP-ViTs (the same share in each group, stable order), DIMAP (one threshold per module).
    """
    _refuse_outside(sparsity)
    ranked = {name: _ranked(name, score, previous, keep_at_least) for name, score in scores.items()}
    pattern = N_OF_M.fullmatch(scope)
    if pattern:
        masks = {name: _n_of_m(name, s, int(pattern[1]), int(pattern[2]), sparsity) for name, s in ranked.items()}
    elif scope == "head":
        masks = {name: _per_row(name, s, sparsity, keep_at_least) for name, s in ranked.items()}
    else:
        masks = _per_pool(ranked, sparsity, _pools(scores, scope, groups), keep_at_least)
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
    return min(_count(sparsity, blocks), blocks - 1)


def _remove_pairs(ranked: list[float], mask: Tensor, keep: int) -> None:
    left = mask.nonzero().flatten().tolist()
    while len(left) > keep:
        worths = [ranked[unit] for unit in left[:-1]]
        at = worths.index(min(worths))
        mask[left[at : at + 2]] = False
        if at > 0:  # its next one is another now
            ranked[left[at - 1]] = float("inf")
        del left[at : at + 2]


def sparsity_of(scope: str) -> float | None:
    """Fraction that an N:M scope removes, or None where the sparsity is free.

    Raises:
        BadInput: N is not between 1 and M - 1.
    """
    pattern = N_OF_M.fullmatch(scope)
    return 1 - _stay(int(pattern[1]), int(pattern[2])) if pattern else None


def _stay(n: int, m: int) -> float:
    if not 0 < n < m:
        raise BadInput(f"scope '{n}:{m}': N of M weights stay, so N must be between 1 and M - 1")
    return n / m


def _refuse_outside(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise BadInput(f"sparsity {sparsity}: must be at least 0 and below 1 (the fraction to remove)")


def _count(sparsity: float, units: int) -> int:
    return int(sparsity * units + 0.5)


def _ranked(name: str, score: Tensor, previous: Masks | None, keep_at_least: int) -> Tensor:
    """Scores as they compete: what is gone is -inf, what is protected is +inf."""
    if bool(score.isnan().any()):
        raise BadInput(f"{name}: {int(score.isnan().sum())} scores are NaN; check the model's weights and the images")
    ranked = score.detach().to("cpu", torch.float64).clone()
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
    threshold = flat.kthvalue(remove).values
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
        pools[by_name[name].pool if scope == "module" else _structure(by_name[name])].append(name)
    return pools


def _structure(group: Group) -> tuple[object, ...]:
    """What isomorphic groups share: kind and the addresses of their slices without block numbers."""
    return (group.kind, *((re.sub(r"\.\d+\.", ".#.", p.param), p.axis, p.outer, p.inner) for p in group.slices))


def _per_pool(ranked: Scores, sparsity: float, pools: dict[object, list[str]], keep_at_least: int) -> Masks:
    masks: Masks = {}
    for names in pools.values():
        flat = torch.cat([ranked[name].flatten() for name in names])
        protected = sum(min(keep_at_least, ranked[name].numel()) for name in names)
        keep = _keep_best(flat, max(protected, flat.numel() - _count(sparsity, flat.numel())))
        pieces = torch.split(keep, [ranked[name].numel() for name in names])
        masks |= {name: piece.view(ranked[name].shape) for name, piece in zip(names, pieces, strict=True)}
    return {name: masks[name] for name in ranked}


def _per_row(name: str, score: Tensor, sparsity: float, keep_at_least: int) -> Tensor:
    if score.dim() != 2:
        raise BadInput(f"{name}: scope 'head' needs scores of shape (heads, channels), these are {list(score.shape)}")
    width = score.shape[1]
    keep = max(min(keep_at_least, width), width - _count(sparsity, width))
    return torch.stack([_keep_best(row, keep) for row in score])


def _n_of_m(name: str, score: Tensor, n: int, m: int, sparsity: float) -> Tensor:
    implied = 1 - _stay(n, m)
    if abs(sparsity - implied) > 1e-9:
        raise BadInput(f"scope '{n}:{m}': removes {implied:g}, but sparsity is {sparsity:g}; set it to {implied:g}")
    rows = score.flatten(1)
    if rows.shape[1] % m:
        raise BadInput(f"{name}: rows of {rows.shape[1]} weights cannot be divided into runs of {m}; leave it out")
    runs = rows.reshape(-1, m)
    order = runs.argsort(dim=1, stable=True)  # ascending: the first m - n go
    mask = torch.ones_like(runs, dtype=torch.bool).scatter(1, order[:, : m - n], False)
    return mask.view(score.shape)
