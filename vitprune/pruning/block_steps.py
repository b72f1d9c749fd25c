"""Blocks that go one at a time: the next removal, and the dense names of what is left."""

from collections.abc import Mapping, Sequence

from vitprune.groups import Group, Masks, is_within, removed_modules
from vitprune.pruning.select import blocks_removed


def next_block_removal(
    groups: Sequence[Group], target: Mapping[str, float], kept: Masks | None = None
) -> Mapping[str, float]:
    """The target itself or, where it takes several blocks of a group, one more of them and nothing else.

    Every removal forms a new pair of neighbours, so blocks are scored again after each.

    Source: UP-ViTs, progressive block pruning.
    """
    pending, several = [], False
    for group in groups:
        if group.kind == "block" and "block" in target:
            blocks = group.units // 2
            gone = 0 if kept is None else blocks - int(kept[group.name].sum()) // 2
            more = blocks_removed(target["block"], blocks) - gone
            several = several or more > 1
            pending += [(gone + 1) / blocks] if more > 0 else []
    return {"block": min(pending)} if several else target


def to_dense_names(dense: Sequence[Group], now: Sequence[Group], kept: Masks) -> dict[str, str]:
    """Name in the dense model of every group of a model whose blocks, as `kept` has them, have moved up."""
    moved: dict[str, str] = {}
    for group in dense:
        if group.kind == "block":
            left = [path for path, keep in zip(group.sublayers, kept[group.name].tolist(), strict=True) if keep]
            moved |= {new: old for (new, *_), (old, *_) in zip(group.sublayers, left, strict=False)}
    found = {}
    for group in now:
        path = next((path for path in moved if is_within(group.name, [path])), None)
        found[group.name] = group.name if path is None else moved[path] + group.name.removeprefix(path)
    return found


def remaining_groups(groups: Sequence[Group], masks: Masks) -> list[Group]:
    """Groups that do not belong to a sub-layer that has gone."""
    gone = removed_modules([group for group in groups if group.name in masks], masks)
    return [group for group in groups if not is_within(group.name, gone)]
