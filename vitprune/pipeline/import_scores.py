"""Import the score lists released by the authors of UP-ViTs: plain text, one number per line."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitprune import models
from vitprune.config.params import Params
from vitprune.criteria import Importance
from vitprune.errors import BadInput
from vitprune.groups import Group, Scores
from vitprune.pipeline.project_data import METRICS, OUT
from vitprune.pipeline.score_stage import scored_groups, write_scores
from vitprune.pruning.plan import plan_of
from vitprune.pruning.preparation import narrowed
from vitprune.runtime.files import write_json

NAME_PARTS = {"residual": "neck", "attention": "attn", "ffn": "ffn"}
PARSINGS = ("correct", "authors_compat")
DIGITS = re.compile(r"\d+\.?\d*")


def import_scores(params: Params, directory: Path, parsing: str) -> None:
    """Write the outputs of the score stage from the authors' lists.

    Args:
        params: The project's params.yaml.
        directory: Directory of the lists.
        parsing: See `read_scores`.

    Raises:
        BadInput: the method would compute other scores than those of the lists, or a list is missing or malformed.
    """
    plan = plan_of(params)
    if plan.method.rescore or plan.method.update_from_stats:
        raise BadInput(f"prune.method {params.prune.method}: computes scores of its own; set it to upvits-exact")
    if plan.config.rotate_residual:
        raise BadInput("prune.rotate_residual: imported scores are those of the model's own channels; set it to false")
    groups = scored_groups(narrowed(models.load(OUT / "dense"), plan), plan)
    facts = {"method": params.prune.method, "lists": directory.name, "parsing": parsing}
    facts |= write_scores(OUT / "score", groups, Importance(read_all(directory, groups, parsing)))
    write_json(METRICS / "score.json", facts)


def read_scores(path: Path, parsing: str = "correct") -> Tensor:
    """Read a score list.

    Args:
        path: The list, one number per line in the order of the units.
        parsing: "correct" reads numbers. "authors_compat" reads the last run of digits of a line, as the authors'
            ranking does: it ignores signs and exponents (4.1e-05 becomes 5.0), so that the least important units rank
            highest. Use it only to reproduce their index lists.

    Returns:
        Scores (units,), float64.

    Raises:
        BadInput: the file is missing, a line is not a finite number, or the parsing is unknown.
    """
    if parsing not in PARSINGS:
        raise BadInput(f"parsing {parsing!r}: unknown; use one of {', '.join(PARSINGS)}")
    scores = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            value = float(line)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf"):
            raise BadInput(f"{path}: line {number} is {line[:40]!r}, not a finite number; is this a list of scores?")
        scores.append(value if parsing == "correct" else float(DIGITS.findall(line)[-1]))
    return torch.tensor(scores, dtype=torch.float64)


def read_all(directory: Path, groups: Sequence[Group], parsing: str = "correct") -> Scores:
    """Read the scores of residual, attention and ffn groups from the lists under a directory.

    Lists are identified by their names: *_neck_768_kl_5k.txt, *_attn_768_kl_3_5k.txt for block 3, and so on.

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


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give one of the authors' lists") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInput(f"{path}: not a text file; give one of the authors' lists") from None


def _list_of(directory: Path, group: Group) -> Path:
    if group.kind not in NAME_PARTS:
        raise BadInput(
            f"{group.name}: there are lists for {', '.join(NAME_PARTS)}, not for kind {group.kind!r}; set prune.kinds"
        )
    block = re.search(r"\.(\d+)\.", group.name)
    middle = f"{block[1]}_" if block else ""
    pattern = f"*_{NAME_PARTS[group.kind]}_{group.units}_kl_{middle}*k.txt"
    paths = sorted(path for path in directory.rglob(pattern) if re.search(rf"_kl_{middle}\d+k$", path.stem))
    if len(paths) != 1:
        names = f"several ({', '.join(path.name for path in paths[:2])})" if paths else "none"
        raise BadInput(f"{directory}: expected one list {pattern} for {group.name}, found {names}")
    return paths[0]
