"""Check the arguments of public functions against their annotations."""

import functools
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
from timm.utils import ModelEma
from torch import Tensor, nn

from vitprune.errors import BadInput

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
ACCEPTED: dict[Any, Any] = {  # instead of the type itself
    float: Real,
    int: Integral,
    bool: (bool, np.bool_),
    Path: PathLike,
    nn.Module: (nn.Module, ModelEma),
}
ONE = {
    "Module": "a model of timm.create_model or vitprune.load",
    "Tensor": "a tensor of images (B, C, H, W)",
    "Path": "a path",
    "str": "a name",
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
}
MANY = {
    "Group": "groups of find_groups",
    "Module": "models",
    "Tensor": "tensors",
    "str": "names",
    "int": "integers",
    "float": "numbers",
    "tuple": "pairs (images, labels)",
}


def check_arguments(but: Container[str] = ()) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a function so that it refuses arguments whose type is not the annotated one.

    Elements of lists and mappings are checked if their type is a class. Batches are only checked to be iterable.

    Args:
        but: Names of arguments that the function checks itself.

    Returns:
        The decorator. The decorated function raises BadInput, with the name of the argument and what to give.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)
        expected = {
            name: _alternatives(parameter.annotation)
            for name, parameter in signature.parameters.items()
            if name not in but
        }

        @functools.wraps(function)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # a missing or an unknown argument, which Python's own message names
                return function(*args, **kwargs)
            for name in filter(expected.__contains__, given):
                _check(name, given[name], expected[name])
            return function(*args, **kwargs)

        return checked

    return decorate


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in _alternatives(part))
    return (annotation,)


def _check(name: str, value: Any, expected: Sequence[Any]) -> None:
    named = [kind for kind in expected if kind is not NoneType and not (kind is str and Path in expected)]
    wanted = " or ".join(dict.fromkeys(map(_words, named)))
    matching = next((kind for kind in expected if _accepts(kind, value)), None)
    if matching is None:
        if isinstance(value, str) and any(map(_takes_names, expected)):
            raise BadInput(f"{name}: {value!r} is a string; give a list, as in [{value!r}]")
        raise BadInput(f"{name}: is a {type(value).__name__}; give {wanted}")
    for key, element in _elements(value, matching):
        raise BadInput(f"{name}: has a {type(element).__name__} at {key!r}; give {wanted}")


def _accepts(expected: Any, value: Any) -> bool:
    """Return whether a value has an annotated type; the types of its elements are not checked."""
    kind = get_origin(expected) or expected
    if kind in (Any, object, inspect.Parameter.empty):
        return True
    if kind is Literal:
        return isinstance(value, tuple({type(choice) for choice in get_args(expected)}))
    if kind is Callable:
        return callable(value)
    if _is_series(expected):
        has_items = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
        others = (str, bytes, Tensor, nn.Module, type, *(() if _takes_names(expected) else (Mapping,)))
        return has_items and not isinstance(value, others)
    return isinstance(value, ACCEPTED.get(kind, kind))


def _is_series(expected: Any) -> bool:
    """Return whether a type is a list or another iterable, but no mapping."""
    kind = get_origin(expected)
    return isinstance(kind, type) and issubclass(kind, Iterable) and not issubclass(kind, Mapping)


def _takes_names(expected: Any) -> bool:
    """Return whether a type is a list of names."""
    element = (get_args(expected) or (None,))[0]
    return _is_series(expected) and (element is str or get_origin(element) is Literal)


def _words(expected: Any) -> str:
    """Describe an expected type, for an error message."""
    kind, parts = get_origin(expected) or expected, get_args(expected)
    if kind is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if kind is Callable:
        return "a function"
    if issubclass(kind, Mapping):
        return f"a mapping of names to {_plural(parts[1])}"
    if _is_series(expected):
        return f"{'a list or a DataLoader' if get_origin(parts[0]) is tuple else 'a list'} of {_plural(parts[0])}"
    return ONE.get(kind.__name__, f"a {kind.__name__}")


def _plural(expected: Any) -> str:
    kind = get_origin(expected) or expected
    if kind is Literal:
        return "names"
    return MANY.get(getattr(kind, "__name__", ""), "values")


def _elements(value: Any, expected: Any) -> Iterator[tuple[object, Any]]:
    """Yield the elements of a list or a mapping that have another type than its class of elements, with their keys."""
    parts, element_type = get_args(expected), (get_args(expected) or (None,))[-1]
    if not isinstance(element_type, type) or get_origin(element_type) is not None or get_origin(expected) is Literal:
        return
    items: Iterable[tuple[object, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items() if len(parts) == 2 else ()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    yield from ((key, element) for key, element in items if not _accepts(element_type, element))
