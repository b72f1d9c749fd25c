"""Forward passes whose reshapes infer the width of heads, from the source code of the original ones.

Many attentions compute sizes from the width C of their input, as in `reshape(B, N, heads, C // heads)` or
`reshape(B, N, C)`, and so run only as long as their heads fill that width. Here the argument that holds the width is
replaced in a copy of the method: by -1, or by the size of the tensor if another argument is -1. Arguments that are
attributes, as `self.head_dim`, remain. The class of the module is changed to a subclass with these methods, so that
parameters, their names and references to the module remain valid. Whether the result is right is proven elsewhere.
"""

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

RESHAPES = ("reshape", "view")
OBSERVE, VALUE = "_observe_sizes", "_value"
# by method and number of the call: positions of attributes, sizes, and shape before
Observed = dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
Classes = tuple[tuple[str, type[nn.Module]], ...]  # class by path of a module
# method, number of the call, position of the size that becomes -1, position of the size that is taken from the tensor
Choices = frozenset[tuple[str, int, int | None, int | None]]


def inferring_classes(
    model: nn.Module,
    sizes: Collection[int],
    run: Callable[[], object],
    leave_out: Collection[str] = (),
    largest: bool = False,
) -> Classes:
    """Return subclasses of the classes of modules that infer these sizes in their reshapes, but those in attributes.

    Args:
        model: The model; its modules have other classes while it runs.
        sizes: Numbers of channels and multiples of them, as in the dense model.
        run: Runs the dense model once.
        leave_out: Paths of modules whose class remains.
        largest: Infer the largest of several such sizes of a reshape instead of the last one, which may be a number of
            positions.

    Returns:
        Path and class of every module with such reshapes.
    """
    observed: dict[str, Observed] = {}
    modules = [entry for entry in model.named_modules() if entry[0] not in leave_out]
    kinds = {path: type(module) for path, module in modules}
    for path, module in modules:
        observed[path] = {}
        kind = kinds[path]
        if not kind.__module__.startswith("torch.nn."):
            module.__class__ = _subclass(original_class(kind), _choices_of(kind), observed[path])
    try:
        run()
    finally:
        for path, module in modules:
            module.__class__ = kinds[path]
    classes = ((path, _with_choices(kind, _choices(observed[path], sizes, largest))) for path, kind in kinds.items())
    return tuple((path, kind) for path, kind in classes if kind is not kinds[path])


def observed_sizes(module: nn.Module, run: Callable[[], object]) -> Observed:
    """Return the sizes of the first call of every reshape of a module that infers none, in their order.

    Args:
        module: The module; it has another class meanwhile.
        run: Runs it once.
    """
    observed: Observed = {}
    kind: Any = type(module)
    module.__class__ = _subclass(original_class(kind), _choices_of(kind), observed)
    try:
        run()
    finally:
        module.__class__ = kind
    return observed


def with_inferred(kind: type[nn.Module], method: str, call: int, position: int) -> type[nn.Module]:
    """Return a class that infers one more size: of a call of reshape in a method, by its number and the position."""
    return _with_choices(kind, frozenset({(method, call, position, None)}))


def _choices(observed: Observed, sizes: Collection[int], largest: bool) -> Choices:
    choices: set[tuple[str, int, int | None, int | None]] = set()
    for (method, call), (attributes, given, shape) in observed.items():
        stale = [position for position, size in enumerate(given) if size in sizes and position not in attributes]
        if -1 not in given:
            ordered = sorted(stale, key=given.__getitem__) if largest else stale
            choices |= {(method, call, position, None) for position in ordered[-1:]}
            continue
        kept = [position for position in stale if shape[position : position + 1] == (given[position],)]
        if kept:
            choices.add((method, call, None, kept[-1]))
        elif stale and shape[given.index(-1) :][:1] == (-math.prod(shape) // math.prod(given),):
            choices.add((method, call, stale[-1], given.index(-1)))
    return frozenset(choices)


def _with_choices(kind: type[nn.Module], choices: Choices) -> type[nn.Module]:
    known, original = _choices_of(kind), original_class(kind)
    wider: type[nn.Module] = _inferring(original, known | choices) if choices - known else kind  # type: ignore[arg-type]
    return wider


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a class of any width was made from; any other class itself.

    Args:
        kind: A class of modules.
    """
    original: type[nn.Module] = vars(kind).get("_original", kind)
    return original


def _choices_of(kind: type[nn.Module]) -> Choices:
    choices: Choices = vars(kind).get("_choices", frozenset())
    return choices


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module a class for any width; what its class infers already remains inferred.

    Args:
        module: The module; only its class changes.
        kind: A class of `inferring_classes`, or one with a forward pass written by hand.
    """
    if original_class(kind) is original_class(type(module)):
        kind = _with_choices(kind, _choices_of(type(module)))
    module.__class__ = kind


def restore_class(module: nn.Module) -> None:
    """Give a module its original class again if all its layers read and the last one writes as many channels.

    Args:
        module: The module; only its class changes.
    """
    layers: list[Any] = [layer for layer in module.children() if isinstance(layer, nn.Linear | nn.Conv2d)]
    widths = {layer.weight.shape[1] for layer in layers} | {len(layer.weight) for layer in layers[-1:]}
    if len(widths) == 1:
        module.__class__ = original_class(type(module))


@functools.cache
def _inferring(kind: Any, choices: Choices) -> Any:
    return _subclass(kind, choices, None)


def _subclass(kind: Any, choices: Choices, observed: Observed | None) -> Any:
    """Return a subclass with rewritten methods: reshapes infer the chosen sizes, others are observed."""
    methods = {}
    for name, function in _methods(kind):
        rewritten = _rewritten(name, function, choices, observed)
        if rewritten is not None:
            methods[name] = rewritten
    if not methods:
        return kind
    more = {"__module__": __name__, "_original": kind, "_choices": choices}
    return type(f"{kind.__name__}OfAnyWidth", (kind,), methods | more)


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Methods of a class and its bases below nn.Module that are plain functions with source code."""
    names = dict.fromkeys(name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base))
    for name in names:
        function = inspect.getattr_static(kind, name, None)
        if isinstance(function, FunctionType) and name != "__init__" and not function.__code__.co_freevars:
            yield name, function


def _rewritten(name: str, function: FunctionType, choices: Choices, observed: Observed | None) -> FunctionType | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    editor = _Reshapes(name, choices, observed is not None)
    editor.visit(definition)
    if not editor.changed:
        return None
    definition.returns, arguments = None, definition.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    defined: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec"), defined)
    scope = function.__globals__ if observed is None else function.__globals__ | {OBSERVE: _observer(name, observed)}
    result = FunctionType(defined[name].__code__, scope, name, function.__defaults__)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


class _Reshapes(ast.NodeTransformer):
    """Rewrite calls tensor.reshape(a, b, c) and tensor.view(a, b, c)."""

    def __init__(self, method: str, choices: Choices, observe: bool) -> None:
        self.changed = False
        self._positions = {call: positions for name, call, *positions in choices if name == method}
        self._observe, self._calls = observe, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Rewrite one call."""
        self.generic_visit(node)
        function, arguments = node.func, node.args
        if not isinstance(function, ast.Attribute) or function.attr not in RESHAPES or node.keywords:
            return node
        literal = len(arguments) == 1 and isinstance(arguments[0], ast.Tuple | ast.List)
        sizes: list[ast.expr] = arguments[0].elts if literal else arguments  # type: ignore[attr-defined]
        if len(sizes) < 2 or any(isinstance(size, ast.Starred) for size in sizes):
            return node
        number, self._calls = self._calls, self._calls + 1
        if number in self._positions:
            self.changed = True
            return _inferring_call(function.value, sizes, *self._positions[number])
        if self._observe:
            self.changed = True
            attributes = [position for position, size in enumerate(sizes) if isinstance(size, ast.Attribute)]
            places = ast.Tuple([ast.Constant(position) for position in attributes], ast.Load())
            given = [function.value, ast.Constant(number), places, *sizes]
            return ast.Call(ast.Name(OBSERVE, ast.Load()), given, [])
        return node


def _inferring_call(tensor: ast.expr, sizes: list[ast.expr], inferred: int | None, kept: int | None) -> ast.Call:
    """Return a call of reshape with one size inferred by -1, and one taken from the tensor."""
    if inferred is not None:
        sizes[inferred] = ast.Constant(-1)
    if kept is None:
        return ast.Call(ast.Attribute(tensor, "reshape", ast.Load()), sizes, [])
    name = ast.Name(VALUE, ast.Load())
    sizes[kept] = ast.Subscript(ast.Attribute(name, "shape", ast.Load()), ast.Constant(kept), ast.Load())
    body = ast.Call(ast.Attribute(name, "reshape", ast.Load()), sizes, [])
    given = ast.arguments([], [ast.arg(VALUE)], None, [], [], None, [])
    return ast.Call(ast.Lambda(given, body), [tensor], [])


def _observer(method: str, observed: Observed) -> Callable[..., Any]:
    def observe(tensor: Any, number: int, attributes: tuple[int, ...], *sizes: Any) -> Any:
        if isinstance(tensor, Tensor):  # not torch.reshape
            observed.setdefault((method, number), (attributes, tuple(sizes), tuple(tensor.shape)))
        return tensor.reshape(*sizes)

    return observe
