"""Find modules whose output is added to a residual stream, and that can be skipped: their output may be zero.

Every candidate's output is followed as if it were zero. Operations that give zero for zero keep it so; its sum with the
stream is the stream. A candidate whose output is used in any other way is no branch.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from vitprune.architectures.tracing.op_rules import ADDITIONS, REARRANGEMENTS
from vitprune.architectures.tracing.residual_branches import MAX_ELEMENTS, TrackedInput
from vitprune.groups import is_within
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.outputs import tensors_of

JOINS = ("cat", "stack")  # zero if all parts are
ZERO_AT_ZERO = (
    *("neg", "gelu", "relu", "relu_", "silu", "silu_", "tanh", "dropout", "native_dropout", "sum", "mean"),
    *("div", "div_", "avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d"),
)  # of their first argument
PRODUCTS = ("mul", "mul_", "mm", "bmm", "matmul")
SHAPES_ONLY = ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")


@dataclass(frozen=True)
class ResidualBranch:
    """A branch of a residual block, x + f(x).

    Attributes:
        path: The module whose output may be zero.
        block: The block that it is in.
        shape: Of its output.
        unused: Modules that have no effect then, because only this module reads what they return, or because they scale
            its output; each with the shape of its output.
    """

    path: str
    block: str
    shape: "OutputShape"
    unused: tuple[tuple[str, "OutputShape"], ...] = ()


@dataclass(frozen=True)
class OutputShape:
    """Shape of a module's output, given its first input.

    Attributes:
        axis: Axis whose length may differ from that of the input.
        length: This length; None if it is that of the input.
        outputs: Number of outputs; 0 for a single tensor. Only the first of several is read.
    """

    axis: int
    length: int | None
    outputs: int = 0


def find_branches(model: nn.Module, images: Tensor, blocks: Collection[str]) -> list[ResidualBranch]:
    """Find the branches of residual blocks, in the order in which they are added to the stream.

    Args:
        model: The model; it runs twice, in evaluation mode. It may be on the meta device, no values are needed.
        images: Its input.
        blocks: Paths of the modules in which to look; the stream is their first input.

    Returns:
        At most one branch per addition: of several modules that fit, the one with the most parameters.
    """
    with torch.no_grad(), eval_mode(model):
        run = _Run(model, blocks)
        with run.recording():
            model(images)
        chosen = run.branches()
        effects = _EffectRun(model, chosen)
        with effects.recording():
            model(images)
    return [effects.with_unused(branch) for branch in chosen]


@dataclass
class _ZeroOutput:
    """Tensors that are zero if a module's output is; `site`: numbers of the additions that they are part of."""

    path: str
    block: str
    shape: OutputShape
    zeros: Any = field(default_factory=WeakIdKeyDictionary)
    others: Any = field(default_factory=WeakIdKeyDictionary)  # further outputs of the module, which nobody may read
    sites: list[int] = field(default_factory=list)
    scaled: list[tuple[str, OutputShape]] = field(default_factory=list)  # modules that were given and returned zeros
    failed: bool = False

    def follow(self, call: "_Call", number: int, is_stream: Callable[[Tensor], bool]) -> None:
        """Follow the zeros through an operation that has run."""
        given = [value for value in call.tensors if value in self.zeros]
        if any(value in self.others for value in call.tensors) and call.name not in SHAPES_ONLY:
            self.failed = True
        elif not given or call.name in SHAPES_ONLY:
            return
        elif call.name in ADDITIONS and call.kwargs.get("alpha", 1) == 1 and len(given) < len(call.args[:2]):
            other = next(value for value in call.args[:2] if value is not given[0])
            fits = isinstance(other, Tensor) and other.shape == call.results[0].shape and is_stream(other)
            self.sites.append(number)
            self.failed = not fits
            if call.is_mutable and given[0] is call.args[0]:
                del self.zeros[given[0]]
        elif call.gives_zero(given):
            for value in call.results:
                self.zeros[value] = True
        else:
            self.failed = True


@dataclass(frozen=True)
class _Call:
    """An operation that has run."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    results: list[Tensor]
    is_mutable: bool

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it was given."""
        return [*tensors_of(self.args), *tensors_of(dict(self.kwargs))]

    def gives_zero(self, zeros: Sequence[Tensor]) -> bool:
        """Whether the result is zero if these arguments are."""
        first = self.args[0]
        if self.name in JOINS:
            return len(zeros) == len(first)
        if self.name == "constant_pad_nd":
            return not (self.args[2] if len(self.args) > 2 else 0)
        if self.name in PRODUCTS:
            return True
        if self.name == "convolution":
            return first is zeros[0] and self.args[2] is None
        return (self.name in REARRANGEMENTS or self.name in ZERO_AT_ZERO) and first is zeros[0]


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operation, then calls a function with it."""

    def __init__(self, after: Callable[[Any, _Call, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._after = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = _Call(
            func.overloadpacket.__name__, args, kwargs or {}, list(tensors_of(result)), bool(func._schema.is_mutable)
        )
        self._after(func, call, result)
        return result


@contextmanager
def _hooked(handles: Sequence[RemovableHandle], after: Callable[[Any, _Call, Any], None]) -> Iterator[None]:
    """Call a function after every operation while the context is open; remove the hooks at its end."""
    try:
        with _Mode(after):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Run:
    """First pass: which modules are branches."""

    def __init__(self, model: nn.Module, blocks: Collection[str]) -> None:
        self._model = model
        self._blocks = {path: model.get_submodule(path) for path in blocks}
        self._inside = [
            (path, module)
            for path, module in model.named_modules()
            if any(True for _ in module.parameters()) and any(is_within(path, [b]) and path != b for b in blocks)
        ]
        self._streams: list[tuple[str, TrackedInput]] = []  # of the blocks that run now
        self._candidates: dict[str, _ZeroOutput] = {}
        self._active: list[_ZeroOutput] = []
        self._calls: Counter[str] = Counter()
        self._number = 0

    def branches(self) -> list[ResidualBranch]:
        """Return one branch per addition, in the order of the additions."""
        by_site: dict[int, _ZeroOutput] = {}
        for candidate in self._candidates.values():
            if candidate.failed or len(candidate.sites) != 1 or self._calls[candidate.path] != 1:
                continue
            best = by_site.get(candidate.sites[0])
            if best is None or self._size(candidate.path) > self._size(best.path):
                by_site[candidate.sites[0]] = candidate
        return [
            ResidualBranch(candidate.path, candidate.block, candidate.shape, tuple(candidate.scaled))
            for _, candidate in sorted(by_site.items())
        ]

    def _size(self, path: str) -> int:
        return sum(parameter.numel() for parameter in self._model.get_submodule(path).parameters())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow zeros while the context is open."""
        handles = []
        for path, module in self._blocks.items():
            handles += [module.register_forward_pre_hook(self._enter(path))]
            handles += [module.register_forward_hook(self._leave)]
        for path, module in self._inside:
            handles.append(module.register_forward_hook(self._start(path), with_kwargs=True))
        with _hooked(handles, self._follow):
            yield

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else torch.empty(0)
            small = first.is_floating_point() and first.numel() <= MAX_ELEMENTS
            self._streams.append((path, TrackedInput(first if small else torch.empty(0))))

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        path, _ = self._streams.pop()
        self._active = [candidate for candidate in self._active if candidate.block != path]

    def _start(self, path: str) -> Callable[..., None]:
        def start(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._calls[path] += 1
            values, given = list(tensors_of(output)), [*tensors_of(args), *tensors_of(dict(kwargs))]
            if not self._streams or not values or not given:
                return
            shape = _output_shape(given[0], output)
            for candidate in self._active:  # modules between a branch and the stream
                if shape is not None and all(value in candidate.zeros for value in [*given, *values]):
                    candidate.scaled.append((path, shape))
            if shape is not None and values[0] is not given[0]:
                candidate = _ZeroOutput(path, self._streams[-1][0], shape)
                candidate.zeros[values[0]] = True
                for value in values[1:]:
                    candidate.others[value] = True
                self._candidates[path] = candidate
                self._active.append(candidate)

        return start

    def _follow(self, func: Any, call: _Call, result: Any) -> None:
        self._number += 1
        for candidate in self._active:
            candidate.follow(call, self._number, self._is_stream)
        self._active = [candidate for candidate in self._active if not candidate.failed]
        for _, stream in self._streams:
            stream.track(func, call.args, call.kwargs, result)

    def _is_stream(self, value: Tensor) -> bool:
        return any(stream.has_all_of(value) for _, stream in self._streams)


class _EffectRun:
    """Second pass: which modules have no effect without a branch, because only the branch reads what they return."""

    def __init__(self, model: nn.Module, branches: Sequence[ResidualBranch]) -> None:
        self._model = model
        self._branches = {branch.path: branch for branch in branches}
        self._in_block: dict[str, list[str]] = {}
        for branch in branches:
            self._in_block.setdefault(branch.block, []).append(branch.path)
        self._running: list[str] = []  # branches that run now
        self._effects: dict[tuple[str, str], Any] = {}  # (branch, module): tensors that depend on the module
        self._shapes: dict[str, OutputShape] = {}
        self._unused: dict[str, list[str]] = {path: [] for path in self._branches}
        self._seen: Counter[str] = Counter()

    def with_unused(self, branch: ResidualBranch) -> ResidualBranch:
        """Return a branch with all its unused modules, the outermost ones."""
        unused = {path: self._shapes[path] for path in self._unused[branch.path] if self._seen[path] == 1}
        unused |= dict(branch.unused)
        outermost = [path for path in unused if not any(is_within(path, [other]) for other in unused if other != path)]
        return replace(branch, unused=tuple((path, unused[path]) for path in outermost))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow the effects while the context is open."""
        blocks = {block: self._model.get_submodule(block) for block in self._in_block}
        handles = [module.register_forward_hook(self._leave_block(block)) for block, module in blocks.items()]
        for path, module in self._model.named_modules():
            if path in self._branches:
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(lambda *call: self._running.pop() and None))
            elif path and any(True for _ in module.parameters()):
                handles.append(module.register_forward_hook(self._start(path)))
        with _hooked(handles, self._follow):
            yield

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self._running.append(path)

        return enter

    def _start(self, path: str) -> Callable[..., None]:
        def start(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[path] += 1
            given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            shape = None if given is None or not isinstance(output, Tensor) else _output_shape(given, output)
            if shape is None or self._running:
                return
            self._shapes[path] = shape
            for block, branches in self._in_block.items():
                if is_within(path, [block]) and path != block:
                    for branch in branches:
                        if not is_within(branch, [path]):
                            self._effects[branch, path] = WeakIdKeyDictionary({output: True})

        return start

    def _follow(self, func: Any, call: _Call, result: Any) -> None:
        if call.name in SHAPES_ONLY:
            return
        tensors = call.tensors
        for (branch, _), reached in self._effects.items():
            if branch not in self._running and any(value in reached for value in tensors):
                for value in [*call.results, *([call.args[0]] if call.is_mutable else [])]:
                    reached[value] = True

    def _leave_block(self, block: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            for branch in self._in_block[block]:
                for key in [key for key in self._effects if key[0] == branch]:
                    reached = self._effects.pop(key)
                    if not any(value in reached for value in tensors_of(output)):
                        self._unused[branch].append(key[1])

        return leave


def _output_shape(given: Tensor, output: Any) -> OutputShape | None:
    """Return the shape of an output; None if it differs from the input in more than one axis, or in the first."""
    returned = next(tensors_of(output))
    outputs = len(output) if isinstance(output, tuple) else 0
    others = output[1:] if outputs else ()
    if given.dim() != returned.dim() or not given.dim() or isinstance(output, list | dict):
        return None
    if not all(value is None or isinstance(value, Tensor) for value in others):  # such as a size, which is read
        return None
    axes = [axis for axis, (old, new) in enumerate(zip(given.shape, returned.shape, strict=True)) if old != new]
    if len(axes) > 1 or axes == [0]:
        return None
    return OutputShape(axes[0], returned.shape[axes[0]], outputs) if axes else OutputShape(-1, None, outputs)
