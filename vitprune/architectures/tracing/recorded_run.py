"""One recorded forward pass of a model: its operations, and the modules that enter and leave, in their order.

All analyses of a model's structure read the same record, so that the model runs once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vitprune.architectures.tracing.example_run import with_example
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.architectures.tracing.meta_operations import run_operation
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.outputs import tensors_of

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a module's forward pass, in float64 on the meta device
MADE_LIKE = ("new_", "empty", "zeros", "ones", "full", "rand", "arange")  # read no values, only shapes


@dataclass(frozen=True)
class Operation:
    """An ATen operation that has run."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any

    @cached_property
    def name(self) -> str:
        """Its name without the overload."""
        name: str = self.func.overloadpacket.__name__
        return name

    @cached_property
    def is_mutable(self) -> bool:
        """Whether it writes into an argument."""
        return bool(self.func._schema.is_mutable)

    @cached_property
    def reads_shapes_only(self) -> bool:
        """Whether its result does not depend on the values of its arguments."""
        return self.name.startswith(MADE_LIKE)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors that it was given."""
        return [*tensors_of(self.args), *tensors_of(dict(self.kwargs))]

    @cached_property
    def results(self) -> list[Tensor]:
        """All tensors that it returned."""
        return list(tensors_of(self.result))


@dataclass(frozen=True)
class Entered:
    """A module begins to run, with these arguments."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Left:
    """A module has run."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class RecordedPass:
    """A forward pass in evaluation mode, without gradients and without fused attention.

    Attributes:
        model: The model that ran; it may be on the meta device.
        inputs: Its input.
        output: What it returned.
        events: What happened, in order; all tensors are kept.
    """

    model: nn.Module
    inputs: Tensor
    output: Any
    events: tuple[Operation | Entered | Left, ...]

    def calls(self, paths: Collection[str]) -> dict[str, Call]:
        """Return the arguments of the first call of modules."""
        entered = (event for event in reversed(self.events) if isinstance(event, Entered) and event.path in paths)
        return {event.path: (_on_meta(event.args), _on_meta(event.kwargs)) for event in entered}

    def apart(self, paths: Collection[str]) -> set[str]:
        """Return the modules whose first arguments do not depend on the input; none if no module's do."""
        reached = {id(self.inputs)}
        depends: dict[str, bool] = {}
        for event in self.events:
            if isinstance(event, Entered) and event.path in paths:
                depends.setdefault(
                    event.path, any(id(one) in reached for one in tensors_of((event.args, event.kwargs)))
                )
            elif isinstance(event, Operation) and not event.reads_shapes_only:
                spread(reached, event)
        return {path for path, is_reached in depends.items() if not is_reached} if any(depends.values()) else set()


def spread(reached: set[int], operation: Operation) -> None:
    """Add the results of an operation to the tensors that are reached, if one of its arguments is.

    Args:
        reached: The ids of tensors of one record, which keeps them all.
        operation: An operation of this record.
    """
    if any(id(value) in reached for value in operation.tensors):
        written = tensors_of(operation.args[:1] if operation.is_mutable else ())
        reached.update(id(value) for value in [*operation.results, *written])


def record_run(model: nn.Module, inputs: Tensor) -> RecordedPass:
    """Run a model once and record it.

    Args:
        model: The model, in evaluation mode while it runs; parameters may be on the meta device.
        inputs: Its input.
    """
    events: list[Operation | Entered | Left] = []
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_entering(events, path), with_kwargs=True))
        handles.append(module.register_forward_hook(_leaving(events, path), with_kwargs=True))
    try:
        with eval_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Recorder(events):
            output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return RecordedPass(model, inputs, output, tuple(events))


def _entering(events: list[Any], path: str) -> Callable[..., None]:
    return lambda module, args, kwargs: events.append(Entered(path, module, args, kwargs))


def _leaving(events: list[Any], path: str) -> Callable[..., None]:
    return lambda module, args, kwargs, output: events.append(Left(path, module, args, kwargs, output))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operation and records it."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = run_operation(func, args, kwargs or {})
        self._events.append(Operation(func, args, kwargs or {}, result))
        return result


_RUNS: StructureCache[RecordedPass] = StructureCache(1)  # a record keeps all tensors of a forward pass


def recorded(model: nn.Module) -> RecordedPass:
    """Return a recorded run of a copy of a model at its own input size, cached for models of the same structure.

    Raises:
        BadInput: the model does not run.
    """
    return _RUNS.value_for(model, lambda one: with_example(one, record_run))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta", torch.float64 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return type(value)(_on_meta(item) for item in value) if type(value) in (tuple, list) else value
