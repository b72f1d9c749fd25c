"""Find residual modules, x + f(x) or act(x + f(x)), by tracking every element of their input through operations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vitprune.architectures.tracing.op_rules import ADDITIONS, IDENTITIES, REARRANGEMENTS, VIEWS
from vitprune.architectures.tracing.recorded_run import Entered, Left, Operation, RecordedPass

ACTIVATIONS = ("relu", "relu_", "silu", "silu_", "gelu", "hardswish", "hardswish_", "leaky_relu", "leaky_relu_")
MAX_ELEMENTS = 1 << 24  # of a tracked input: 64 channels of 512 x 512 positions


def find_residual_modules(run: RecordedPass, paths: Collection[str]) -> set[str]:
    """Find the modules that return their first input plus something, x + f(x), or an activation of it, in every call.

    Args:
        run: A recorded run of the model.
        paths: Paths of the modules to look at.

    Returns:
        The paths of the residual modules. A module that does not run, or whose input has more than MAX_ELEMENTS
        elements, is not among them.
    """
    calls: dict[str, list[bool]] = {}
    running: list[TrackedInput] = []
    for event in run.events:
        if isinstance(event, Operation):
            for tracked in running:
                tracked.track(event)
        elif event.path in paths and isinstance(event, Entered):
            running.append(TrackedInput(event))
        elif event.path in paths and isinstance(event, Left):
            calls.setdefault(event.path, []).append(running.pop().is_residual_output(event.output))
    return {path for path, is_residual in calls.items() if all(is_residual)}


@dataclass(frozen=True)
class _Elements:
    """Index of the input element at each position of a tensor, and whether something was added to any of them."""

    indices: Tensor
    has_addend: bool = False


class TrackedInput:
    """Positions of the elements of a module's first input; they have the indices 1, 2, 3, ..., anything else has 0."""

    def __init__(self, call: Entered) -> None:
        first = call.args[0] if call.args and isinstance(call.args[0], Tensor) else torch.empty(0)
        value = first if first.numel() <= MAX_ELEMENTS else torch.empty(0)
        self._indices = torch.arange(1, value.numel() + 1, dtype=torch.int32).view(value.shape)
        self._by_tensor: Any = WeakIdKeyDictionary({value: _Elements(self._indices)})

    def track(self, operation: Operation) -> None:
        """Track the elements through an operation; only additions and rearrangements keep them."""
        func, args, kwargs, result = operation.func, operation.args, operation.kwargs, operation.result
        name = operation.name
        tracked: list[_Elements] = []
        if name in ADDITIONS and kwargs.get("alpha", 1) == 1:
            tracked = self._added(args, result)
        elif name in ACTIVATIONS:  # of the sum, as in ResNet
            elements = self._by_tensor.get(args[0])
            tracked = [elements] if elements is not None and elements.has_addend else []
        elif name in REARRANGEMENTS:
            tracked = self._rearranged(func, args, kwargs, result)
        results = result if isinstance(result, list | tuple) else [result]
        for value in results if operation.is_mutable else ():
            if isinstance(value, Tensor):
                self._forget(value)
        for value, elements in zip(results, tracked, strict=False):
            self._by_tensor[value] = elements

    def _added(self, args: Sequence[Any], result: Tensor) -> list[_Elements]:
        if not isinstance(args[1], Tensor):
            return []
        operands = [elements for value in args[:2] if (elements := self._by_tensor.get(value)) is not None]
        if len(operands) != 1 or operands[0].indices.shape != result.shape:
            return []
        return [_Elements(operands[0].indices, True)]

    def _rearranged(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> list[_Elements]:
        name, several = func.overloadpacket.__name__, isinstance(args[0], list | tuple)
        values = args[0] if several else args[:1]
        known = [self._by_tensor.get(value) for value in values]
        if not any(known):
            return []
        nothing = torch.zeros((), dtype=torch.int32)
        indices = [
            nothing.expand(v.shape) if elements is None else elements.indices
            for v, elements in zip(values, known, strict=True)
        ]
        if name in VIEWS:
            moved: Any = indices[0].reshape(result.shape)
        elif name in IDENTITIES:
            moved = indices[0]
        else:
            try:
                others = (args[1], 0) if name == "constant_pad_nd" else args[1:]
                moved = func(indices if several else indices[0], *others, **kwargs)
            except (RuntimeError, TypeError):  # the operation is not implemented for integers
                return []
        has_addend = any(elements is not None and elements.has_addend for elements in known)
        return [_Elements(part, has_addend) for part in (moved if isinstance(moved, list | tuple) else [moved])]

    def _forget(self, value: Tensor) -> None:
        """Stop tracking all tensors that share memory with a tensor that was written to."""
        memory = value.untyped_storage()._cdata
        for other in list(self._by_tensor):
            if other.untyped_storage()._cdata == memory:
                del self._by_tensor[other]

    def has_all_of(self, value: Tensor) -> bool:
        """Whether a tensor has elements of the input at all positions, with or without something added."""
        elements = self._by_tensor.get(value)
        return elements is not None and bool((elements.indices > 0).all())

    def is_residual_output(self, output: Any) -> bool:
        """Whether an output is the input plus something."""
        elements = self._by_tensor.get(output) if isinstance(output, Tensor) else None
        return elements is not None and elements.has_addend and torch.equal(elements.indices, self._indices)
