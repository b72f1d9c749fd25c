"""vitprune makes vision transformers smaller and proves it."""

from vitprune.architectures import find_groups
from vitprune.errors import BadInput
from vitprune.evaluation.cost import count
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
    "count",
    "find_groups",
    "load",
    "plan_for",
    "prune",
    "save",
    "score",
    "select",
    "shrink",
    "write_card",
    "zero",
]
