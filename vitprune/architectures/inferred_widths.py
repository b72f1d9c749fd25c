"""Forward passes whose reshapes infer the width of heads, from the source code of the original ones.

Many attentions compute sizes from the width C of their input, as in `reshape(B, N, heads, C // heads)` or
`reshape(B, N, C)`, and so run only as long as their heads fill that width. Here the argument that holds the width is
replaced by -1 in a copy of the method. The class of the module is changed to a subclass with these methods, so that
parameters, their names and references to the module remain valid. Whether the result is right is proven elsewhere.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

RESHAPES = ("reshape", "view")
OBSERVE, ORIGIN = "_observe_sizes", "_origin_of_class"
Observed = dict[tuple[str, int], tuple[int, tuple[int, ...]]]  # by method and number of the call: elements, sizes
Choices = frozenset[tuple[str, int, int]]  # method, number of the call, and position of the size to infer


def inferring_class(module: nn.Module, sizes: Collection[int], run: Callable[[nn.Module], object]) -> Any:
    """Return a subclass of a module's class that infers these sizes in its reshapes; the class itself if none occurs.

    Args:
        module: the module; it may be inside of the one that runs.
        sizes: numbers of channels and multiples of them, as in the dense module.
        run: runs the dense module once.
    """
    observed = observed_sizes(module, run)
    choices = frozenset(
        (method, call, max(position for position, size in enumerate(given) if size in sizes))
        for (method, call), (_, given) in observed.items()
        if any(size in sizes for size in given)
    )
    return inferring(type(module), choices)


def observed_sizes(module: nn.Module, run: Callable[[nn.Module], object]) -> Observed:
    """Return the sizes of the first call of every reshape of a module that does not infer one of them, in their order.

    Args:
        module: the module; it may be inside of the one that runs.
        run: runs the module once; an error that it raises is ignored.
    """
    kind: Any = type(module)
    observed: Observed = {}
    observing = _subclass(*_origin(kind), observed)
    module.__class__ = observing
    try:
        run(module)
    except Exception:  # a forward pass may raise anything; what was observed until then counts
        return observed
    finally:
        module.__class__ = kind
    return observed


def inferring(kind: Any, choices: Choices) -> Any:
    """Return the subclass of a class that infers these sizes, and those that it inferred before."""
    dense, known = _origin(kind)
    return _inferring(dense, known | choices) if choices else kind


def set_class(module: nn.Module, kind: Any) -> None:
    """Change the class of a module to one for other widths; sizes that the module infers already remain inferred."""
    (dense, _), (other, choices) = _origin(type(module)), _origin(kind)
    module.__class__ = inferring(type(module), choices) if dense is other else kind


def _origin(kind: Any) -> tuple[Any, Choices]:
    """Return the class from which a class was derived here, and the sizes that it infers."""
    return vars(kind).get(ORIGIN, (kind, frozenset()))


@functools.cache
def _inferring(kind: Any, choices: Choices) -> Any:
    return _subclass(kind, choices, None)


def _subclass(kind: Any, choices: Choices, observed: Observed | None) -> Any:
    """Return a subclass with rewritten methods: reshapes are observed, or infer the chosen sizes."""
    methods = {}
    for name, function in _methods(kind):
        rewritten = _rewritten(name, function, choices, observed)
        if rewritten is not None:
            methods[name] = rewritten
    if not methods:
        return kind
    return type(f"{kind.__name__}OfAnyWidth", (kind,), methods | {"__module__": __name__, ORIGIN: (kind, choices)})


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
    """Rewrite calls tensor.reshape(a, b, c) and tensor.view(a, b, c) without a -1."""

    def __init__(self, method: str, choices: Choices, observe: bool) -> None:
        self.changed = False
        self._choices = {(call, position) for name, call, position in choices if name == method}
        self._observe, self._calls = observe, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Rewrite one call."""
        self.generic_visit(node)
        function, arguments = node.func, node.args
        if not isinstance(function, ast.Attribute) or function.attr not in RESHAPES or node.keywords:
            return node
        literal = len(arguments) == 1 and isinstance(arguments[0], ast.Tuple | ast.List)
        sizes: list[ast.expr] = arguments[0].elts if literal else arguments  # type: ignore[attr-defined]
        if len(sizes) < 2 or any(isinstance(size, ast.Starred) or ast.unparse(size) == "-1" for size in sizes):
            return node
        number, self._calls = self._calls, self._calls + 1
        chosen = [position for position in range(len(sizes)) if (number, position) in self._choices]
        for position in chosen:
            sizes[position], self.changed = ast.Constant(-1), True
        if self._observe and not chosen:
            self.changed = True
            return ast.Call(ast.Name(OBSERVE, ast.Load()), [function.value, ast.Constant(number), *sizes], [])
        node.func = ast.Attribute(function.value, "reshape", ast.Load())
        return node


def _observer(method: str, observed: Observed) -> Callable[..., Tensor]:
    def observe(tensor: Tensor, number: int, *sizes: int) -> Tensor:
        observed.setdefault((method, number), (tensor.numel(), tuple(sizes)))
        return tensor.reshape(sizes)

    return observe
