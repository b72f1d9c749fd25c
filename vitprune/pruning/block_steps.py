"""Progressive removal of blocks and branches: the next one to remove, and the dense names of the remaining groups."""

from collections.abc import Mapping, Sequence

from vitprune.groups import Group, Masks, dense_name, is_within, removed_modules
from vitprune.pruning.select import blocks_removed


def next_block_removal(
    groups: Sequence[Group], target: Mapping[str, float], kept: Masks | None = None
) -> Mapping[str, float]:
    """Return the target, or the removal of one more block or branch if the target removes several of a group.

    Every removal of a block forms a new pair of neighboring sub-layers, and every removal of a branch changes what the
    others are worth, so they are scored again after each.

    Args:
        groups: Groups of the dense model.
        target: Sparsity per kind.
        kept: Masks so far; None before the first removal.

    Source: UP-ViTs, progressive block pruning.
    """
    pending, several, kind = [], False, "block" if "block" in target else "branch"
    for group in groups:
        if group.kind == kind and kind in target:
            size = 2 if kind == "block" else 1
            blocks = group.units // size
            removed = 0 if kept is None else blocks - int(kept[group.name].sum()) // size
            more = blocks_removed(target[kind], blocks) - removed
            several = several or more > 1
            pending += [(removed + 1) / blocks] if more > 0 else []
    return {kind: min(pending)} if several else target


def to_dense_names(dense: Sequence[Group], now: Sequence[Group], kept: Masks) -> dict[str, str]:
    """Map the group names of a model with removed blocks to the names in the dense model.

    Args:
        dense: Groups of the dense model.
        now: Groups of the model, whose blocks are numbered without the removed ones.
        kept: Masks of the dense model's groups.
    """
    paths = dense_paths(dense, kept)
    return {group.name: dense_name(group.name, paths) for group in now}


def dense_paths(dense: Sequence[Group], kept: Masks) -> dict[str, str]:
    """Map the paths of the sub-layers of a model with removed blocks to those in the dense model.

    Args:
        dense: Groups of the dense model.
        kept: Their masks. Groups of whole blocks leave an `IdentityBlock` in place of a block, so no path changes.
    """
    result: dict[str, str] = {}
    for group in dense:
        if group.kind == "block" and not group.whole_blocks:
            left = [paths for paths, keep in zip(group.sublayers, kept[group.name].tolist(), strict=True) if keep]
            for now, before in zip(group.sublayers, left, strict=False):
                result |= dict(zip(now, before, strict=True))
    return result


def remaining_groups(groups: Sequence[Group], masks: Masks) -> list[Group]:
    """Return the groups that are not inside a removed sub-layer."""
    removed = removed_modules([group for group in groups if group.name in masks], masks)
    return [group for group in groups if not is_within(group.name, removed)]
