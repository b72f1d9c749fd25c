"""How many units of a group may stay: between two shares, and in multiples of a width."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

SLACK = 1e-6  # of a unit: a share times a number of units is no finer in floating point


@dataclass(frozen=True)
class Constraint:
    """Range of a group's sparsity (`min_sparsity` to `max_sparsity`) and the `multiple` of units that remain.

    Where both shares are one, the group competes with no other. Of attention channels all this is of each head.
    """

    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    multiple: int = 1

    @property
    def is_fixed(self) -> bool:
        """Whether exactly so much goes, whatever the others lose."""
        return self.min_sparsity == self.max_sparsity

    def window(self, units: int) -> tuple[int, int]:
        """The fewest and the most of so many units that may stay; the first is the larger where no number may.

        A group of fewer units than the multiple stays as it is, and so does one that may lose nothing.
        """
        if self.max_sparsity == 0 or units < self.multiple:
            return units, units
        if self.is_fixed:
            wanted = nearest_multiple(units - rounded(self.min_sparsity * units), self.multiple, units)
            return wanted, wanted
        fewest, most = (
            units - math.floor(self.max_sparsity * units + SLACK),
            units - math.ceil(self.min_sparsity * units - SLACK),
        )
        if self.multiple == 1:
            return fewest, most
        return max(1, math.ceil(fewest / self.multiple)) * self.multiple, most // self.multiple * self.multiple

    def kept(self, units: int, left: int, protected: int = 0) -> range:
        """Numbers that may stay of so many units of which `left` are still there, ascending, never none.

        What is gone stays gone, and `protected` units stay, whatever the bounds.
        """
        fewest, most = (min(left, max(number, min(protected, left))) for number in self.window(units))
        if self.multiple > 1 and self.max_sparsity > 0 and most == left < units:
            most = max(left // self.multiple * self.multiple, min(left, self.multiple))
        return range(min(fewest, most), most + 1, self.multiple)


UNCONSTRAINED = Constraint()
Constraints = Mapping[str, Constraint]  # by group; one that is not named is free


def rounded(number: float) -> int:
    """The nearest whole number, of two the larger."""
    return int(number + 0.5)


def nearest_multiple(number: int, multiple: int, most: int) -> int:
    """The multiple nearest to a number, of two the larger; at least one, and no more than fit into `most`."""
    return min(max(1, rounded(number / multiple)), max(1, most // multiple)) * multiple


def nearest(kept: range, wanted: int) -> int:
    """The number in a range that is nearest to the wanted one, of two the larger."""
    below = kept[max(0, min(len(kept) - 1, (wanted - kept[0]) // kept.step))]
    above = min(kept[-1], below + kept.step)
    return above if below < wanted and above - wanted <= wanted - below else below


def removal_steps(left: int, kept: range) -> list[tuple[int, int]]:
    """Places of units that go together, among the `left` in ascending order of worth: (begin, end) of each lot.

    The first lot must go where all that are left may not stay.
    """
    stops = [left, *(number for number in reversed(kept) if number < left)]
    return [(left - more, left - fewer) for more, fewer in itertools.pairwise(stops)]


def middle(lot: tuple[int, int]) -> int:
    """The unit by which a lot is ranked: its group's count is rounded down once half of the lot would go."""
    return (lot[0] + lot[1] - 1) // 2


def in_lots(worths: Sequence[Sequence[float]], kept: Sequence[range], remove: int) -> list[int]:
    """How many units of each group stay, where they go in lots: as many lots, the worst first, as come nearest.

    `worths` are each group's finite scores in ascending order; of equal lots those of the first group go first.
    """
    line: list[tuple[float, int, int]] = []  # rank of a lot, its group, its size
    for group, (worth, allowed) in enumerate(zip(worths, kept, strict=True)):
        for lot in removal_steps(len(worth), allowed):
            must = lot[0] == 0 and len(worth) > allowed[-1]
            line.append((-math.inf if must else worth[middle(lot)], group, lot[1] - lot[0]))
    line.sort(key=itemgetter(0))
    gone = [0, *itertools.accumulate(size for _, _, size in line)]
    first = sum(rank == -math.inf for rank, _, _ in line)
    end = min(range(first, len(gone)), key=lambda number: abs(gone[number] - remove))
    stay = [len(worth) for worth in worths]
    for _, group, size in line[:end]:
        stay[group] -= size
    return stay


def shared(bounds: Constraints, names: Sequence[str]) -> list[list[str]]:
    """Groups that compete as pools of their own: those whose share is said leave the others."""
    together = [name for name in names if not bounds.get(name, UNCONSTRAINED).is_fixed]
    return [[name] for name in names if bounds.get(name, UNCONSTRAINED).is_fixed] + ([together] if together else [])
