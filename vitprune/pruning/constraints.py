"""Constraints on the sparsity of single groups, and multiples of remaining units (`prune.rules`, `prune.round_to`)."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from vitprune.config.prune_config import HEAD_CHANNELS
from vitprune.config.targets import Rule
from vitprune.errors import BadInput
from vitprune.groups import Group

WIDTHS = ("ffn", *HEAD_CHANNELS, "head", "residual")  # kinds whose number of units is a width of layers
TOLERANCE = 1e-6  # in units: rounding error of a sparsity times a number of units


@dataclass(frozen=True)
class Constraint:
    """Constraint on a group; for attention channels, on every head.

    Attributes:
        min_sparsity: Least sparsity.
        max_sparsity: Largest sparsity. If it equals `min_sparsity`, the group does not compete with others.
        multiple: The number of remaining units is a multiple of this.
    """

    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    multiple: int = 1

    @property
    def is_fixed(self) -> bool:
        """Whether the sparsity is given, independently of other groups."""
        return self.min_sparsity == self.max_sparsity

    def window(self, units: int) -> tuple[int, int]:
        """Return the smallest and the largest number of units that may remain of so many; reversed if there is none.

        A group with fewer units than the multiple, or with largest sparsity 0, keeps all of them.
        """
        if self.max_sparsity == 0 or units < self.multiple:
            return units, units
        if self.is_fixed:
            wanted = nearest_multiple(units - rounded(self.min_sparsity * units), self.multiple, units)
            return wanted, wanted
        fewest = units - math.floor(self.max_sparsity * units + TOLERANCE)
        most = units - math.ceil(self.min_sparsity * units - TOLERANCE)
        if self.multiple == 1:
            return fewest, most
        return max(1, math.ceil(fewest / self.multiple)) * self.multiple, most // self.multiple * self.multiple

    def kept(self, units: int, left: int, protected: int = 0) -> range:
        """Return the numbers of units that may remain, ascending and never empty.

        Args:
            units: Units of the group.
            left: Units that earlier cycles have left; the number cannot grow.
            protected: Units that remain whatever the constraint.
        """
        fewest, most = (min(left, max(number, min(protected, left))) for number in self.window(units))
        if self.multiple > 1 and self.max_sparsity > 0 and most == left < units:
            most = max(left // self.multiple * self.multiple, min(left, self.multiple))
        return range(min(fewest, most), most + 1, self.multiple)


UNCONSTRAINED = Constraint()
Constraints = Mapping[str, Constraint]  # by group; groups that are not named are unconstrained


def constraints_of(
    groups: Sequence[Group], rules: Sequence[Rule], round_to: Mapping[str, int], progress: float = 1.0
) -> dict[str, Constraint]:
    """Return the constraints of all groups to which a rule or a multiple applies.

    Args:
        groups: The groups.
        rules: Rules; the first one that matches the name of a group applies.
        round_to: Multiple per kind.
        progress: Fraction of a gradual run that is done: least sparsities are scaled by it, largest ones are not.

    Raises:
        BadInput: a rule matches no group, or no number of units of a group satisfies its constraint.
    """
    expressions = [re.compile(rule.match) for rule in rules]
    for number, expression in enumerate(expressions):
        if not any(expression.fullmatch(group.name) for group in groups):
            kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
            raise BadInput(
                f"prune.rules.{number}: {expression.pattern!r} matches the full name of no group of kind {kinds}, "
                f"such as {groups[0].name}; vitprune inspect lists them"
            )
    _check_multiples(groups, round_to)
    result = {}
    for group in groups:
        matching = [number for number, expression in enumerate(expressions) if expression.fullmatch(group.name)]
        rule = _constraint(rules[matching[0]]) if matching else UNCONSTRAINED
        final = replace(rule, multiple=round_to.get(group.kind, 1))
        if matching:
            _check_feasible(matching[0], rules[matching[0]], group, final)
        now = replace(final, min_sparsity=final.min_sparsity * progress)
        now = replace(now, max_sparsity=now.min_sparsity) if final.is_fixed else now
        if now != UNCONSTRAINED:
            result[group.name] = now
    return result


def _check_multiples(groups: Sequence[Group], round_to: Mapping[str, int]) -> None:
    """Refuse a multiple that is larger than every group of its kind, of which no unit could be removed."""
    for kind, multiple in round_to.items():
        widths = [group.shape[-1] if kind in HEAD_CHANNELS else group.units for group in groups if group.kind == kind]
        if widths and max(widths) < multiple:
            raise BadInput(f"prune.round_to {multiple}: the largest group of kind {kind} has {max(widths)} units")


def _constraint(rule: Rule) -> Constraint:
    if rule.ignore:
        return Constraint(0.0, 0.0)
    if rule.sparsity is not None:
        return Constraint(rule.sparsity, rule.sparsity)
    return Constraint(rule.min_sparsity or 0.0, 1.0 if rule.max_sparsity is None else rule.max_sparsity)


def _check_feasible(number: int, rule: Rule, group: Group, constraint: Constraint) -> None:
    """Refuse a constraint that no number of units (of channels of a head, of blocks) satisfies."""
    units = group.shape[-1] if group.kind in HEAD_CHANNELS else group.units
    fewest, most = constraint.window(units // 2 if group.kind == "block" else units)
    if fewest > most or (units < constraint.multiple and constraint.min_sparsity > 0):
        multiple = f" in multiples of {constraint.multiple}" if constraint.multiple > 1 else ""
        raise BadInput(
            f"prune.rules.{number}: {rule.match!r} allows no number of the {units} units of {group.name}{multiple}; "
            "widen the range between its bounds, or ignore the group"
        )


def rounded(number: float) -> int:
    """Round to the nearest integer, half up."""
    return int(number + 0.5)


def nearest_multiple(number: int, multiple: int, most: int) -> int:
    """Round to the nearest multiple, half up; at least one, at most the largest one that is <= `most`."""
    return min(max(1, rounded(number / multiple)), max(1, most // multiple)) * multiple


def nearest(kept: range, wanted: int) -> int:
    """Return the number in a range that is nearest to the wanted one, of two equally near ones the larger."""
    below = kept[max(0, min(len(kept) - 1, (wanted - kept[0]) // kept.step))]
    above = min(kept[-1], below + kept.step)
    return above if below < wanted and above - wanted <= wanted - below else below


def removal_steps(left: int, kept: range) -> list[tuple[int, int]]:
    """Split the `left` units, in ascending order of importance, into ranges (begin, end) that are removed in one step.

    The first step is mandatory if not all of them may remain.
    """
    stops = [left, *(number for number in reversed(kept) if number < left)]
    return [(left - more, left - fewer) for more, fewer in itertools.pairwise(stops)]


def middle(step: tuple[int, int]) -> int:
    """Return the unit whose score ranks a step: the group's count is rounded down from half of the step on."""
    return (step[0] + step[1] - 1) // 2


def select_in_steps(scores: Sequence[Sequence[float]], kept: Sequence[range], remove: int) -> list[int]:
    """Return how many units of each group remain if they are removed in steps, least important first.

    Args:
        scores: Finite scores of each group, ascending.
        kept: Numbers of units that may remain, per group.
        remove: Units to remove in total; the nearest possible number is removed.
    """
    steps: list[tuple[float, int, int]] = []  # score, group, units
    for group, (ascending, allowed) in enumerate(zip(scores, kept, strict=True)):
        for step in removal_steps(len(ascending), allowed):
            mandatory = step[0] == 0 and len(ascending) > allowed[-1]
            steps.append((-math.inf if mandatory else ascending[middle(step)], group, step[1] - step[0]))
    steps.sort(key=itemgetter(0))
    removed = [0, *itertools.accumulate(units for _, _, units in steps)]
    first = sum(score == -math.inf for score, _, _ in steps)
    end = min(range(first, len(removed)), key=lambda number: abs(removed[number] - remove))
    remaining = [len(ascending) for ascending in scores]
    for _, group, units in steps[:end]:
        remaining[group] -= units
    return remaining


def competing(constraints: Constraints, names: Sequence[str]) -> list[list[str]]:
    """Split groups into those that compete with each other; every group of fixed sparsity is alone."""
    free = [name for name in names if not constraints.get(name, UNCONSTRAINED).is_fixed]
    fixed = [[name] for name in names if constraints.get(name, UNCONSTRAINED).is_fixed]
    return fixed + ([free] if free else [])
