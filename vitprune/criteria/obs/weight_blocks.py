"""Weights as consecutive blocks: flattened row by row and cut, and as many of them at a time as memory holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from torch import nn

from vitprune.errors import BadInput
from vitprune.groups import Group

BYTES = 8  # of a float64


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of one weight, of `size` weights each: `start` to `stop` of it, flattened row by row."""

    param: str
    size: int
    start: int
    stop: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return (self.stop - self.start) // self.size


def block_size(units: int, wanted: int, multiple: int = 1) -> int:
    """The smallest divisor of a layer's number of weights that is at least `wanted`, and a multiple of `multiple`.

    Raises:
        BadInput: the number of weights is no multiple of `multiple`.

    Source: CAP, released code (the layer as a whole where it is smaller than a block).
    """
    if units % multiple:
        raise BadInput(f"{units} weights cannot be divided into runs of {multiple}; leave this layer out")
    steps = units // multiple
    pairs = [(d, steps // d) for d in range(1, isqrt(steps) + 1) if steps % d == 0]
    divisors = [divisor * multiple for pair in pairs for divisor in pair]
    return min(divisor for divisor in divisors if divisor >= min(wanted, units))


def parts_of(model: nn.Module, groups: Sequence[Group], wanted: int, multiple: int = 1) -> list[Part]:
    """All weights of groups of single weights, each as one part.

    Raises:
        BadInput: a group is not one of single weights, or its rows cannot be divided into runs of `multiple`,
            or these are not neighbours.
    """
    found = []
    for group in groups:
        if group.kind != "weight":
            raise BadInput(f"{group.name}: blocks are of single weights, not of kind {group.kind!r}")
        weight = model.get_parameter(group.slices[0].param)
        row = weight[0].numel()
        if multiple > 1 and row != weight.shape[1]:
            raise BadInput(
                f"{group.name}: its runs of {multiple} input channels are apart in memory (kernel "
                f"{'x'.join(map(str, weight.shape[2:]))}), and blocks are of neighbours; use method n:m here"
            )
        if row % multiple:
            raise BadInput(
                f"{group.name}: rows of {row} weights cannot be divided into runs of {multiple}; leave it out"
            )
        size = block_size(weight.numel(), wanted, multiple)
        found.append(Part(group.slices[0].param, size, 0, weight.numel()))
    return found


def portions(parts: Sequence[Part], memory: int, gradients: int = 0) -> list[list[Part]]:
    """Parts in their order, cut where they must be, so that the matrices of each portion fit into `memory` bytes.

    A weight needs a row of its block's matrix and, in flight, a value of each of so many `gradients`. A portion has at
    least one block, whatever it needs.
    """
    found: list[list[Part]] = [[]]
    room = memory
    for part in parts:
        start, need = part.start, part.size * (part.size + gradients) * BYTES  # of a block
        while start < part.stop:
            fitting = min(room // need, (part.stop - start) // part.size)
            if fitting < 1 and found[-1]:
                found.append([])
                room = memory
                continue
            taken = max(1, fitting)
            found[-1].append(Part(part.param, part.size, start, start + taken * part.size))
            start += taken * part.size
            room -= taken * need
    return found
