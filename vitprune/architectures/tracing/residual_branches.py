"""Modules that give back what they are given with something added, found by following every element of their input."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from vitprune.architectures.tracing.op_rules import MOVES, SAME
from vitprune.runtime.eval_mode import eval_mode

ADDS = ("add", "add_")
VIEWS = ("view", "_unsafe_view", "_reshape_alias")
LARGEST = 1 << 24  # elements of an input that is followed: 64 channels of 512 x 512 places


def adding(model: nn.Module, images: Tensor, paths: Collection[str]) -> set[str]:
    """Of the modules at these paths, those that give back their first input, all of it in its place, plus something.

    The model runs once; it may be on the meta device, as no value counts. A module that does not run adds nothing, nor
    does one whose input has more than LARGEST elements.
    """
    answers: dict[str, list[bool]] = {}
    with torch.no_grad(), eval_mode(model), _followed(model, paths, answers):
        model(images)
    return {path for path, adds in answers.items() if all(adds)}


@dataclass(frozen=True)
class _Elements:
    """Which element of the input is where in a tensor, and whether something has been added to any of them."""

    numbers: Tensor
    more: bool = False


class _Input:
    """Where the elements of one module's input are by now: they have the numbers 1, 2, 3, ..., anything else has 0."""

    def __init__(self, value: Tensor) -> None:
        self._numbers = torch.arange(1, value.numel() + 1, dtype=torch.int32).view(value.shape)
        self._known: Any = WeakIdKeyDictionary({value: _Elements(self._numbers)})

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Follow the elements through an operation that has run; what it does not merely move or add to is lost."""
        name = func.overloadpacket.__name__
        found: list[_Elements] = []
        if name in ADDS and kwargs.get("alpha", 1) == 1:
            found = self._added(args, result)
        elif name in MOVES:
            found = self._moved(func, args, kwargs, result)
        results = result if isinstance(result, list | tuple) else [result]
        for value in results if func._schema.is_mutable else ():
            if isinstance(value, Tensor):
                self._forget(value)
        for value, elements in zip(results, found, strict=False):
            self._known[value] = elements

    def _added(self, args: Sequence[Any], result: Tensor) -> list[_Elements]:
        if not isinstance(args[1], Tensor):
            return []
        own = [elements for value in args[:2] if (elements := self._known.get(value)) is not None]
        grown = len(own) == 1 and own[0].numbers.shape == result.shape
        return [_Elements(own[0].numbers, True)] if grown else []

    def _moved(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> list[_Elements]:
        name, several = func.overloadpacket.__name__, isinstance(args[0], list | tuple)
        values = args[0] if several else args[:1]
        found = [self._known.get(value) for value in values]
        if not any(found):
            return []
        nothing = torch.zeros((), dtype=torch.int32)
        numbers = [
            nothing.expand(v.shape) if own is None else own.numbers for v, own in zip(values, found, strict=True)
        ]
        if name in VIEWS:
            moved: Any = numbers[0].reshape(result.shape)
        elif name in SAME:
            moved = numbers[0]
        else:
            try:
                moved = func(numbers if several else numbers[0], *args[1:], **kwargs)
            except (RuntimeError, TypeError):  # this operation has no form for whole numbers
                return []
        more = any(own is not None and own.more for own in found)
        return [_Elements(one, more) for one in (moved if isinstance(moved, list | tuple) else [moved])]

    def _forget(self, value: Tensor) -> None:
        """Something was written into this tensor: whatever shares its memory holds other numbers now."""
        memory = value.untyped_storage()._cdata
        for other in list(self._known):
            if other.untyped_storage()._cdata == memory:
                del self._known[other]

    def has_grown_into(self, answer: Any) -> bool:
        """Whether an answer is the input with something added to it."""
        own = self._known.get(answer) if isinstance(answer, Tensor) else None
        return own is not None and own.more and torch.equal(own.numbers, self._numbers)


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operation, once it has run, to the inputs of the modules that run now."""

    def __init__(self, running: Sequence[_Input]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running = running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in self._running:
            one.follow(func, args, kwargs or {}, result)
        return result


@contextmanager
def _followed(model: nn.Module, paths: Collection[str], answers: dict[str, list[bool]]) -> Iterator[None]:
    """While this is open, note of every call of these modules whether it adds to what it is given."""
    running: list[_Input] = []

    def enter(module: nn.Module, given: Any) -> None:
        first = given[0] if given and isinstance(given[0], Tensor) else torch.empty(0)
        running.append(_Input(first if first.numel() <= LARGEST else torch.empty(0)))

    def leave(path: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, answer: Any) -> None:
            answers.setdefault(path, []).append(running.pop().has_grown_into(answer))

        return note

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(path))]
    try:
        with _Follower(running):
            yield
    finally:
        for handle in handles:
            handle.remove()
