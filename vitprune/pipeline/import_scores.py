"""The score lists and index lists that UP-ViTs' authors have released: plain text, one number per line."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores

PARTS = {"residual": "neck", "attention": "attn", "ffn": "ffn"}
PARSINGS = ("correct", "authors_compat")
DIGITS = re.compile(r"\d+\.?\d*")


def read_scores(path: Path, parsing: str = "correct") -> Tensor:
    """Scores of a list, one per line in the order of the units; (units,) float64.

    `authors_compat` takes the last run of digits of a line, as the authors' ranking does: it drops signs and reads
    4.1e-05 as 5.0, so that the least important units rank as the most important. Only for reproducing their lists.

    Raises:
        BadInput: the file is missing, a line is not a finite number, or the parsing is unknown.
    """
    if parsing not in PARSINGS:
        raise BadInput(f"parsing {parsing!r}: unknown; use one of {', '.join(PARSINGS)}")
    found = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            value = float(line)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise BadInput(f"{path}: line {number} is {line[:40]!r}, not a finite number; is this a list of scores?")
        found.append(value if parsing == "correct" else float(DIGITS.findall(line)[-1]))
    return torch.tensor(found, dtype=torch.float64)


def read_all(directory: Path, groups: Sequence[Group], parsing: str = "correct") -> Scores:
    """Scores of residual, attention and ffn groups from the lists in a directory and those below it.

    The lists are told apart by their names: *_neck_768_kl_5k.txt, *_attn_768_kl_3_5k.txt for block 3, and so on.

    Raises:
        BadInput: a group has no list or several, or its list has another number of scores.
    """
    scores: Scores = {}
    for group in groups:
        path = _list_of(directory, group)
        values = read_scores(path, parsing)
        if len(values) != group.units:
            raise BadInput(f"{path}: {len(values)} scores, but {group.name} has {group.units} units; is it this model?")
        scores[group.name] = values.view(group.shape)
    return scores


def read_mask(path: Path, group: Group) -> Tensor:
    """Mask of a group from an index list, which names the units that go; shape of the group, True keeps.

    Raises:
        BadInput: the file is missing, or a line is not the number of a unit, or names one twice.
    """
    mask = torch.ones(group.units, dtype=torch.bool)
    for number, line in enumerate(_lines(path), start=1):
        unit = int(line) if line.isdecimal() else -1
        if not 0 <= unit < group.units or not mask[unit]:
            raise BadInput(
                f"{path}: line {number} is {line[:40]!r}; each of 0 to {group.units - 1} may be removed once"
            )
        mask[unit] = False
    return mask.view(group.shape)


def removal_lists(scores: Scores, masks: Masks) -> dict[str, list[int]]:
    """What an index list holds: the units that go, ascending by score (of equal ones the lower number first).

    A (heads, channels) group gives one run per head after the other.
    """
    return {name: _removed(scores[name], mask) for name, mask in masks.items()}


def _removed(scores: Tensor, mask: Tensor) -> list[int]:
    rows = mask.view(-1, mask.shape[-1])
    numbers = torch.arange(mask.numel()).view(rows.shape)
    found: list[int] = []
    for row, value, keep in zip(numbers, scores.reshape(rows.shape), rows, strict=True):
        order = value.argsort(stable=True)
        found += row[order][~keep[order]].tolist()
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give one of the authors' lists") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInput(f"{path}: not a text file; give one of the authors' lists") from None


def _list_of(directory: Path, group: Group) -> Path:
    if group.kind not in PARTS:
        raise BadInput(f"{group.name}: there are lists for {', '.join(PARTS)}, not for kind {group.kind!r}")
    block = re.search(r"\.(\d+)\.", group.name)
    middle = f"{block[1]}_" if block else ""
    pattern = f"*_{PARTS[group.kind]}_{group.units}_kl_{middle}*k.txt"
    found = sorted(path for path in directory.rglob(pattern) if re.search(rf"_kl_{middle}\d+k$", path.stem))
    if len(found) != 1:
        names = f"several ({', '.join(path.name for path in found[:2])})" if found else "none"
        raise BadInput(f"{directory}: of the lists {pattern} for {group.name} there must be one here, found {names}")
    return found[0]
