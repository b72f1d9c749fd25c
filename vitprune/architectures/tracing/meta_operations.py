"""Operations on the meta device, whose results are remembered by the shapes of their operands.

Many of torch's shape functions for that device are Python code that takes a millisecond, and a model consists of equal
blocks.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CAPACITY = 1 << 14  # operations
SIMPLE = frozenset(
    {type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
)
NO_OPTIONS: Mapping[str, Any] = {}

_results: dict[Hashable, tuple[tuple[Any, ...], ...] | None] = {}  # None: not new tensors on the meta device
_makes_new: dict[Any, bool] = {}


class _UnknownOperandError(Exception):
    """An operand has values, or a type that is not known here."""


class RememberedShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operation by `run_operation`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operation(func, args, kwargs or NO_OPTIONS)


def run_operation(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation of torch; on the meta device only if it is new for operands of these shapes.

    Args:
        func: The operation, as a dispatch mode gets it.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        Its result.
    """
    if func not in _makes_new:
        schema = func._schema
        _makes_new[func] = not schema.is_mutable and all(value.alias_info is None for value in schema.returns)
    if not _makes_new[func]:
        return func(*args, **kwargs)
    try:
        key = (func, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
    except _UnknownOperandError:
        return func(*args, **kwargs)
    known = _results.get(key)
    if known is None:
        result = func(*args, **kwargs)
        if key not in _results:
            if len(_results) >= CAPACITY:
                _results.clear()
            _results[key] = _described(result)
        return result
    made = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in known]
    return made[0] if len(func._schema.returns) == 1 else tuple(made)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _UnknownOperandError
        return (value.shape, value.stride(), value.dtype)
    kind = type(value)
    if kind is tuple or kind is list:
        return tuple([_key(item) for item in value])
    if kind in SIMPLE:
        return (kind, value)
    raise _UnknownOperandError


def _described(result: Any) -> tuple[tuple[Any, ...], ...] | None:
    """Return shape, strides and type of all results; None if one is not a tensor on the meta device."""
    results = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(one, Tensor) and one.is_meta for one in results):
        return None
    return tuple((one.shape, one.stride(), one.dtype) for one in results)
