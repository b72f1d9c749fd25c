"""Base class of all settings: unknown keys and wrong values are refused with one line that names the key."""

import difflib
from collections.abc import Sequence
from reprlib import Repr
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from vitprune.errors import BadInput

SEEDS = 2**32  # number of seeds
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

RENAMED = {  # keys of earlier versions -> their present names
    "score.classes": "score.fisher_directions",
    "score.block": "score.fisher_block_size",
    "score.damp": "score.damping",
    "score.gradients": "score.num_gradients",
    "prune.heads": "prune.merge_heads_to",
    "prune.recover": "prune.finetune",
    "prune.correct": "prune.correct_norms",
    "prune.hold_zeros": "prune.keep_zeros",
    "prune.reconstruct.views": "prune.reconstruct.mirror",
    "distill.hold_zeros": "distill.keep_zeros",
}

SHOWN = Repr()  # bounds the text of a value in a message
SHOWN.maxstring = SHOWN.maxother = 100
SHOWN.maxdict = SHOWN.maxlist = SHOWN.maxtuple = 8

# what pydantic inserts into the location of an error for a member of a union
UNION_MEMBERS = ("constrained-", "dict[", "[key]", "literal[", "list[", "function-", "Schedule")


class Section(BaseModel):
    """Settings that belong together: a section of params.yaml, or keyword arguments in Python.

    The docstring under each field gives its meaning, unit and default.

    Raises:
        BadInput: a key is unknown or missing, or a value has the wrong type or is out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    section: ClassVar[str] = ""  # name in params.yaml, for the error messages of settings made in Python

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise BadInput(first_error(error, type(self), self.section or type(self).__name__)) from None

    # pydantic then validates a nested section without __init__, so that its errors have the full key
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def at_key(key: str, message: str, value: object) -> PydanticCustomError:
    """Return the error for one key inside a section, to be raised by a validator of the section.

    Args:
        key: Dotted key of the value, relative to the validated section.
        message: What is wrong and what to do.
        value: The value.
    """
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message, "value": value})


def first_error(error: ValidationError, kind: type[Section], section: str = "") -> str:
    """Describe the first error in one line that begins with the dotted key.

    If a key allows several types, the error of the closest type is taken.

    Args:
        error: The errors.
        kind: The model of the settings.
        section: Name of the settings in params.yaml; empty for all of it.
    """
    problems = [(_dotted([section, *problem["loc"]]), problem) for problem in error.errors()]
    for key, problem in problems:
        if problem["type"] == "extra_forbidden":
            return f"{key}: {_renamed(key, _known_keys(kind, problem['loc'][:-1]))}"
    start = problems[0][0]
    near = [(key, problem) for key, problem in problems if f"{key}.".startswith(f"{start}.")]
    key, problem = max(near, key=lambda pair: (pair[0].count("."), pair[1]["type"] == "value_error"))
    others = len(problems) - len(near)
    more = f" (and {others} more)" if others else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "at_key":
        details = problem["ctx"]
        return f"{key}.{details['key']}: {message}, got {shown(details['value'])}{more}"
    prefix = f"{key}: " if key else ""
    value = "" if problem["type"] == "missing" else f", got {shown(problem['input'])}"
    return f"{prefix}{message}{value}{more}"


def check_seed(seed: object) -> None:
    """Refuse a seed that is no integer from 0 to 2**32 - 1.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        value = shown(seed) if isinstance(seed, int) else f"a {type(seed).__name__}"
        raise BadInput(f"seed: is {value}; give an integer from 0 to {SEEDS - 1}")


def shown(value: object) -> str:
    """Return the repr of a value from a file, shortened."""
    try:
        return SHOWN.repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return f"a number of {type(value).__name__} with too many digits"


def similar(name: str, names: Sequence[str]) -> str:
    """Return the words `; did you mean NAME?` if a name is close to one of `names`, else nothing."""
    near = difflib.get_close_matches(name[:80], names, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _renamed(key: str, known: Sequence[str]) -> str:
    if key in RENAMED:
        return f"has been renamed to {RENAMED[key]}"
    hint = similar(key.rpartition(".")[2], known)
    return f"unknown key{hint}" if hint else "unknown key; remove it or correct its name"


def _known_keys(kind: type[Section], location: Sequence[int | str]) -> list[str]:
    """Return the keys of the sections at a location of the settings."""
    sections: list[type[Section]] = [kind]
    for part in location:
        fields = [section.model_fields[str(part)] for section in sections if part in section.model_fields]
        sections = [below for field in fields for below in _sections(field.annotation)] or sections
    return [name for section in sections for name in section.model_fields]


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location if part != "" and not str(part).startswith(UNION_MEMBERS))
