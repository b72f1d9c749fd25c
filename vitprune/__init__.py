"""Prune vision transformers and verify the result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune.architectures import find_groups, merge_heads
    from vitprune.errors import BadInput
    from vitprune.evaluation.accuracy import accuracy
    from vitprune.evaluation.cost import count
    from vitprune.evaluation.latency import latency
    from vitprune.groups import Group, Masks, ParamSlice, Scores, shrink, zero
    from vitprune.models.card import write_card
    from vitprune.models.io import load, save
    from vitprune.pruning.methods import CRITERIA, METHODS
    from vitprune.pruning.plan import plan_for
    from vitprune.pruning.prune import prune, score
    from vitprune.pruning.select import select

__version__ = "0.1.0"
__all__ = [
    "CRITERIA",
    "METHODS",
    "BadInput",
    "Group",
    "Masks",
    "ParamSlice",
    "Scores",
    "accuracy",
    "count",
    "find_groups",
    "latency",
    "load",
    "merge_heads",
    "plan_for",
    "prune",
    "save",
    "score",
    "select",
    "shrink",
    "write_card",
    "zero",
]

_MODULES = {  # imported on first use, so that the command line prints its help without torch
    "architectures": ("find_groups", "merge_heads"),
    "errors": ("BadInput",),
    "evaluation.accuracy": ("accuracy",),
    "evaluation.cost": ("count",),
    "evaluation.latency": ("latency",),
    "groups": ("Group", "Masks", "ParamSlice", "Scores", "shrink", "zero"),
    "models.card": ("write_card",),
    "models.io": ("load", "save"),
    "pruning.methods": ("CRITERIA", "METHODS"),
    "pruning.plan": ("plan_for",),
    "pruning.prune": ("prune", "score"),
    "pruning.select": ("select",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vitprune' has no attribute {name!r}")
    return getattr(import_module(f"vitprune.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
