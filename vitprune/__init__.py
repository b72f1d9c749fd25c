"""vitprune makes vision transformers smaller and proves it."""

from vitprune.card import write_card
from vitprune.compress import prune, score
from vitprune.errors import BadInput
from vitprune.evaluate import count
from vitprune.families import find_groups
from vitprune.groups import Group, Masks, ParamSlice, Scores, shrink, zero
from vitprune.methods import CRITERIA, METHODS
from vitprune.models import load, save
from vitprune.plans import plan_for
from vitprune.select import select

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
