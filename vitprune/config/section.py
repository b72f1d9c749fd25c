"""Base class of all settings: unknown keys and wrong values are refused with one line that names the key."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from vitprune.errors import BadInput

Count = Annotated[int, Field(ge=1)]
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
    "distill.hold_zeros": "distill.keep_zeros",
}

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
            raise BadInput(first_error(error, self.section or type(self).__name__)) from None

    # pydantic then validates a nested section without __init__, so that its errors have the full key
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def at_key(key: str, message: str, value: object) -> PydanticCustomError:
    """Make the error of a value below the validated one, for model validators."""
    return PydanticCustomError("at_key", "{message}", {"key": key, "message": message, "value": value})


def first_error(error: ValidationError, section: str = "") -> str:
    """Describe the first error in one line that begins with the dotted key.

    If a key allows several types, the error of the closest type is taken.
    """
    problems = [(_dotted([section, *problem["loc"]]), problem) for problem in error.errors()]
    for key, problem in problems:
        if problem["type"] == "extra_forbidden" and key in RENAMED:
            return f"{key}: has been renamed to {RENAMED[key]}"
    start = problems[0][0]
    near = [(key, problem) for key, problem in problems if f"{key}.".startswith(f"{start}.")]
    key, problem = max(near, key=lambda pair: (pair[0].count("."), pair[1]["type"] == "value_error"))
    others = len(problems) - len(near)
    more = f" (and {others} more)" if others else ""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or correct its name"
    if problem["type"] == "at_key":
        details = problem["ctx"]
        return f"{key}.{details['key']}: {message}, got {details['value']!r}{more}"
    prefix = f"{key}: " if key else ""
    return f"{prefix}{message}, got {problem['input']!r}{more}"


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location if part != "" and not str(part).startswith(UNION_MEMBERS))
