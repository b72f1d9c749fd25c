"""Cost targets and constraints on single groups (prune.target, prune.rules)."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from vitprune.config.quantity import Quantity, number_of
from vitprune.config.section import Fraction, Section, at_key


def _amount(value: Any) -> Quantity:
    number = number_of(value)
    if not (0 < number < 1 or number > 1):
        raise ValueError("give a fraction of the dense model between 0 and 1, or an absolute number above 1 (600M)")
    return value if isinstance(value, str) else number


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return text


Amount = Annotated[Quantity, PlainValidator(_amount)]


class Target(Section):
    """Largest cost of the pruned model; give exactly one of the keys."""

    section: ClassVar[str] = "prune.target"

    params: Amount | None = None
    """Parameters: a fraction of the dense model's, or a number (12M)."""

    macs: Amount | None = None
    """Multiply-accumulates of one image: a fraction of the dense model's, or a number (600M)."""

    latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Latency of one image on this device, or of a batch by `table`, as a fraction of the dense model's."""

    latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Latency of one image on this device, or of a batch by `table`, in milliseconds."""

    table: Path | None = None
    """Latency table of a device (`vitprune latency-table`), for `latency` and `latency_ms`; null: measure on this
    device."""

    @model_validator(mode="after")
    def _check_one_cost(self) -> Self:
        if len(self.costs) != 1:
            names = ", ".join(name for name in type(self).model_fields if name != "table")
            raise ValueError(f"give one cost of {names}")
        if self.table is not None and self.latency is None and self.latency_ms is None:
            raise at_key("table", "is for latency and latency_ms; remove it", str(self.table))
        return self

    @property
    def costs(self) -> dict[str, float]:
        """The cost and its amount, as a mapping with one item."""
        given = self.model_dump(exclude_none=True, exclude={"table"})
        return {cost: number_of(amount) for cost, amount in given.items()}

    @property
    def is_measured(self) -> bool:
        """Whether the cost is a latency that is measured on this device."""
        return self.table is None and (self.latency is not None or self.latency_ms is not None)


class Rule(Section):
    """Constraint on the groups whose full name matches; give ignore, sparsity, or one or both of the bounds."""

    section: ClassVar[str] = "prune.rules"

    match: Annotated[str, AfterValidator(_expression)]
    """Regular expression for the full name of a group (`vitprune inspect` lists the names)."""

    ignore: Literal[True] | None = None
    """Remove nothing."""

    sparsity: Fraction | None = None
    """Remove exactly this fraction, independently of the other groups."""

    min_sparsity: Fraction | None = None
    """Remove at least this fraction."""

    max_sparsity: Fraction | None = None
    """Remove at most this fraction."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        bounds = [bound for bound in (self.min_sparsity, self.max_sparsity) if bound is not None]
        if [self.ignore is None, self.sparsity is None, not bounds].count(False) != 1:
            raise ValueError("give ignore: true, or sparsity, or min_sparsity and max_sparsity (one or both)")
        if bounds != sorted(bounds):
            raise ValueError("min_sparsity is above max_sparsity; exchange them")
        return self
