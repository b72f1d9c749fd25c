"""Sections of params.yaml that Python code may give as plain mappings as well: targets, and rules for single groups."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from vitprune.config.quantity import Quantity, number_of
from vitprune.errors import BadInput

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _amount(given: Any) -> Quantity:
    number = number_of(given)
    if not (0 < number < 1 or number > 1):
        raise ValueError("give a fraction of the dense model between 0 and 1, or an absolute number above 1 (600M)")
    return given if isinstance(given, str) else number


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return text


Amount = Annotated[Quantity, PlainValidator(_amount)]


class Target(Section):
    """What the pruned model may cost at most, one of these: a fraction of the dense model's, or an absolute number.

    `params` and `macs` take both (600M; K, M and G), `latency` a fraction, `latency_ms` milliseconds on this device.
    """

    params: Amount | None = None
    macs: Amount | None = None
    latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_cost(self) -> Self:
        if len(self.costs) != 1:
            raise ValueError(f"give one cost of {', '.join(type(self).model_fields)}")
        return self

    @property
    def costs(self) -> dict[str, Quantity]:
        """The cost and how much of it."""
        return self.model_dump(exclude_none=True)


class Rule(Section):
    """What holds for groups whose whole name `match` fits, a regular expression; of several rules, the first alone.

    `ignore`: nothing goes. `sparsity`: exactly this fraction goes, whatever the others lose. `min_sparsity`,
    `max_sparsity`: no smaller, no larger fraction goes.
    """

    match: Annotated[str, AfterValidator(_expression)]
    ignore: Literal[True] | None = None
    sparsity: Fraction | None = None
    min_sparsity: Fraction | None = None
    max_sparsity: Fraction | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        bounds = [bound for bound in (self.min_sparsity, self.max_sparsity) if bound is not None]
        if [self.ignore is None, self.sparsity is None, not bounds].count(False) != 1:
            raise ValueError("give ignore: true, or sparsity, or min_sparsity and max_sparsity (one or both)")
        if bounds != sorted(bounds):
            raise ValueError("min_sparsity is above max_sparsity; exchange them")
        return self


def rule_of(given: Rule | Mapping[str, Any], number: int) -> Rule:
    """A rule as Python code gives it, counted from 0 as in params.yaml.

    Raises:
        BadInput: a key is unknown, missing or of a wrong type or value; the line names the rule.
    """
    if isinstance(given, Rule):
        return given
    try:
        return Rule.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in ("prune.rules", number, *problem["loc"]))
        raise BadInput(f"{key}: {problem['msg']}, got {problem['input']!r}") from None
