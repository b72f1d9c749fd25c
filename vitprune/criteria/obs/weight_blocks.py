"""Split weights into consecutive Fisher blocks, and into chunks that fit into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from torch import nn

from vitprune.errors import BadInput
from vitprune.groups import Group

BYTES_PER_VALUE = 8  # of a float64


@dataclass(frozen=True)
class BlockRange:
    """Consecutive blocks of `size` weights: elements `start` to `stop` of a flattened parameter."""

    param: str
    size: int
    start: int
    stop: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return (self.stop - self.start) // self.size


def block_size(units: int, wanted: int, multiple: int = 1) -> int:
    """Return the smallest divisor of a layer's number of weights that is >= `wanted` and a multiple of `multiple`.

    Raises:
        BadInput: the number of weights is not a multiple of `multiple`.

    Source: CAP, released code (a layer smaller than one block is one block).
    """
    if units % multiple:
        raise BadInput(f"{units} weights cannot be divided into runs of {multiple}; exclude this layer")
    steps = units // multiple
    pairs = [(d, steps // d) for d in range(1, isqrt(steps) + 1) if steps % d == 0]
    divisors = [divisor * multiple for pair in pairs for divisor in pair]
    return min(divisor for divisor in divisors if divisor >= min(wanted, units))


def split_into_blocks(model: nn.Module, groups: Sequence[Group], wanted: int, multiple: int = 1) -> list[BlockRange]:
    """Return one block range per group, covering its whole weight.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        wanted: Weights per block, see `block_size`.
        multiple: M of an N:M pattern; blocks and rows are multiples of it.

    Raises:
        BadInput: a group of another kind, rows that are not divisible by `multiple`, or convolution kernels whose
            runs of `multiple` input channels are not contiguous.
    """
    result = []
    for group in groups:
        if group.kind != "weight":
            raise BadInput(f"{group.name}: unstructured criteria score kind 'weight', not {group.kind!r}")
        if why := pattern_refusal(model, group, multiple):
            raise BadInput(why)
        units = model.get_parameter(group.slices[0].param).numel()
        result.append(BlockRange(group.slices[0].param, block_size(units, wanted, multiple), 0, units))
    return result


def pattern_refusal(model: nn.Module, group: Group, multiple: int) -> str:
    """Return why the rows of a weight cannot be divided into runs of so many input channels; empty if they can."""
    weight = model.get_parameter(group.slices[0].param)
    row = weight[0].numel()
    if multiple > 1 and row != weight.shape[1]:
        kernel = "x".join(map(str, weight.shape[2:]))
        why = f"its runs of {multiple} input channels are not contiguous (kernel {kernel})"
        return f"{group.name}: {why}; use method n:m, or exclude it by a rule"
    if row % multiple:
        return f"{group.name}: rows of {row} weights cannot be divided into runs of {multiple}; exclude it by a rule"
    return ""


def fitting_groups(model: nn.Module, groups: Sequence[Group], multiple: int) -> list[Group]:
    """Return the groups whose rows can be divided into runs of `multiple`; others must be ignored by a rule.

    Raises:
        BadInput: there is none.
    """
    refusals = {group.name: pattern_refusal(model, group, multiple) for group in groups if group.kind == "weight"}
    if refusals and all(refusals.values()):
        raise BadInput(next(iter(refusals.values())))
    return [group for group in groups if not refusals.get(group.name)]


def chunk_by_memory(parts: Sequence[BlockRange], memory: int, gradients: int = 0) -> list[list[BlockRange]]:
    """Split block ranges into chunks whose matrices fit into `memory` bytes; a chunk has at least one block.

    A weight needs one row of its block's matrix, and one value of each of `gradients` gradients.
    """
    result: list[list[BlockRange]] = [[]]
    free = memory
    for part in parts:
        start, block_bytes = part.start, part.size * (part.size + gradients) * BYTES_PER_VALUE  # of a block
        while start < part.stop:
            num_blocks = min(free // block_bytes, (part.stop - start) // part.size)
            if num_blocks < 1 and result[-1]:
                result.append([])
                free = memory
                continue
            used_blocks = max(1, num_blocks)
            result[-1].append(BlockRange(part.param, part.size, start, start + used_blocks * part.size))
            start += used_blocks * part.size
            free -= used_blocks * block_bytes
    return result
