"""Fingerprint of a model's structure: equal fingerprints mean equal forward passes on the meta device."""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vitprune.groups import RECORDED_SHAPES
from vitprune.runtime import outputs

CAPACITY = 32  # structures; the groups of a large model take about 1 MiB
SIMPLE = (type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device, BuiltinFunctionType)
SIMPLE_TYPES = frozenset(SIMPLE)
IGNORED = {"training", RECORDED_SHAPES}  # traces run in evaluation mode
KNOWN_HOOKS = {outputs.answer}  # hooks

Value = TypeVar("Value")
_UNCHANGED: dict[int, tuple[Hashable | None]] = {}  # fingerprints of models that do not change now, by their id


class _UnknownStateError(Exception):
    """A module has an attribute whose effect on the forward pass is not known."""


class StructureCache(dict[Hashable, Value]):
    """Values that depend on a model's structure alone, the most recent ones; shared by models of equal structure."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        super().__init__()
        self._capacity = capacity
        self._by_model: WeakKeyDictionary[nn.Module, tuple[Hashable, Value]] = WeakKeyDictionary()

    def value_for(self, model: nn.Module, compute: Callable[[nn.Module], Value]) -> Value:
        """Return the value of a model, computed once for each structure."""
        known = _UNCHANGED.get(id(model))  # one look-up, since another thread may end its block
        key = fingerprint(model) if known is None else known[0]
        if key is None:  # of this model only, until its shapes change
            shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
            entry = self._by_model.get(model)
            if entry is None or entry[0] != shapes:
                self._by_model[model] = entry = (shapes, compute(model))
            return entry[1]
        value = self.pop(key) if key in self else compute(model)
        self[key] = value  # the last one
        while len(self) > self._capacity:
            del self[next(iter(self))]
        return value


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Compute the fingerprint of a model once for all caches; it must not change in the block."""
    if id(model) in _UNCHANGED:
        yield
        return
    _UNCHANGED[id(model)] = (fingerprint(model),)
    try:
        yield
    finally:
        _UNCHANGED.pop(id(model), None)


def fingerprint(model: nn.Module) -> Hashable | None:
    """Return class, attributes and shapes of every module; None if that does not determine the forward pass.

    It does not if a module has hooks, a method that was replaced by a closure, or attributes of unknown types.
    """
    numbers: dict[int, int] = {}
    try:
        return tuple(
            (path, type(module), _freeze_dict(vars(module), numbers))
            for path, module in model.named_modules(remove_duplicate=False)
        )
    except _UnknownStateError:
        return None


def _freeze_dict(values: Mapping[Any, Any], numbers: dict[int, int]) -> Hashable:
    items: list[Hashable] = []
    for key, value in values.items():
        if type(value) in SIMPLE_TYPES:
            if key not in IGNORED:
                items.append((key, value))
        elif str(key).endswith("_hooks"):
            if value and not KNOWN_HOOKS.issuperset(value.values()):
                raise _UnknownStateError
        elif key == "_buffers":
            items.append((key, tuple((name, None if one is None else one.shape) for name, one in value.items())))
        elif key not in IGNORED:
            items.append((key, _freeze(value, numbers)))
    return tuple(items)


def _freeze(value: Any, numbers: dict[int, int]) -> Hashable:
    """Return a hashable copy of an attribute; tensors and modules become their shape and their order of occurrence."""
    if isinstance(value, dict):
        return _freeze_dict(value, numbers)
    if isinstance(value, SIMPLE) or (isinstance(value, FunctionType) and value.__closure__ is None):
        return value
    if isinstance(value, nn.Module):
        return ("module", numbers.setdefault(id(value), len(numbers)))
    if isinstance(value, nn.Parameter):
        return ("parameter", value.shape, numbers.setdefault(id(value), len(numbers)))
    if isinstance(value, list | tuple):
        return (type(value), *(_freeze(item, numbers) for item in value))
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, functools.partial):
        return (value.func, _freeze(value.args, numbers), _freeze(value.keywords, numbers))
    if is_dataclass(value) or type(value).__module__.startswith("transformers."):  # a config
        return (type(value), _freeze_dict(vars(value), numbers))
    raise _UnknownStateError
