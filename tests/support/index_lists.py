"""Index lists of UP-ViTs' authors: the numbers of the removed units, one per line."""

from pathlib import Path

import torch
from torch import Tensor

from vitprune import BadInput, Group, Masks, Scores


def read_mask(path: Path, group: Group) -> Tensor:
    """Read an index list, which names the removed units, as a mask of the group's shape.

    Raises:
        BadInput: a line is not the number of a unit, or names one twice.
    """
    mask = torch.ones(group.units, dtype=torch.bool)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        unit = int(line) if line.isdecimal() else -1
        if not 0 <= unit < group.units or not mask[unit]:
            raise BadInput(
                f"{path}: line {number} is {line[:40]!r}; each of 0 to {group.units - 1} may be removed once"
            )
        mask[unit] = False
    return mask.view(group.shape)


def removal_lists(scores: Scores, masks: Masks) -> dict[str, list[int]]:
    """Return the removed units of each group as index lists name them: ascending by score, ties by number.

    A (heads, channels) group gives the units of one head after the other.
    """
    return {name: _removed(scores[name], mask) for name, mask in masks.items()}


def _removed(scores: Tensor, mask: Tensor) -> list[int]:
    rows = mask.view(-1, mask.shape[-1])
    numbers = torch.arange(mask.numel()).view(rows.shape)
    removed: list[int] = []
    for row, value, keep in zip(numbers, scores.reshape(rows.shape), rows, strict=True):
        order = value.argsort(stable=True)
        removed += row[order][~keep[order]].tolist()
    return removed
