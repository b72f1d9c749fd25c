"""Find modules whose output is added to a residual stream, and that can be skipped: their output may be zero.

Every candidate's output is followed as if it were zero. Operations that give zero for zero keep it so; its sum with the
stream is the stream. A candidate whose output is used in any other way is no branch.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from vitprune.architectures.tracing.op_rules import ADDITIONS, REARRANGEMENTS
from vitprune.architectures.tracing.recorded_run import Entered, Left, Operation, RecordedPass, spread
from vitprune.architectures.tracing.residual_branches import TrackedInput
from vitprune.groups import is_within
from vitprune.runtime.outputs import tensors_of

JOINS = ("cat", "stack")  # zero if all parts are
ZERO_AT_ZERO = (
    *("neg", "gelu", "relu", "relu_", "silu", "silu_", "tanh", "dropout", "native_dropout", "sum", "mean"),
    *("div", "div_", "avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d"),
)  # of their first argument
PRODUCTS = ("mul", "mul_", "mm", "bmm", "matmul")


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


def find_branches(run: RecordedPass, blocks: Collection[str]) -> list[ResidualBranch]:
    """Find the branches of residual blocks, in the order in which they are added to the stream.

    Args:
        run: A recorded run of the model.
        blocks: Paths of the modules in which to look; the stream is their first input.

    Returns:
        At most one branch per addition: of several modules that fit, the one with the most parameters.
    """
    branches = _branches(run, blocks)
    shapes = _modules_without_effect(run, branches)
    return [replace(one, unused=_outermost(shapes[one.path] | dict(one.unused))) for one in branches]


@dataclass
class _ZeroOutput:
    """Ids of tensors that are zero if a module's output is; `sites`: numbers of additions that they are part of."""

    path: str
    block: str
    shape: OutputShape
    zeros: set[int]
    others: set[int]  # further outputs of the module, which nobody may read
    sites: list[int] = field(default_factory=list)
    scaled: list[tuple[str, OutputShape]] = field(default_factory=list)  # modules that were given and returned zeros
    failed: bool = False

    def follow(self, operation: Operation, number: int, is_stream: Callable[[Tensor], bool]) -> None:
        """Follow the zeros through an operation."""
        given = [value for value in operation.tensors if id(value) in self.zeros]
        if operation.reads_shapes_only:
            return
        if any(id(value) in self.others for value in operation.tensors):
            self.failed = True
        elif not given:
            return
        elif operation.name in ADDITIONS and operation.kwargs.get("alpha", 1) == 1 and len(given) < 2:
            other = next(value for value in operation.args[:2] if value is not given[0])
            fits = isinstance(other, Tensor) and other.shape == operation.results[0].shape and is_stream(other)
            self.sites.append(number)
            self.failed = not fits
            if operation.is_mutable and given[0] is operation.args[0]:
                self.zeros.remove(id(given[0]))
        elif _gives_zero(operation, given):
            self.zeros.update(map(id, operation.results))
        else:
            self.failed = True


def _gives_zero(operation: Operation, zeros: Sequence[Tensor]) -> bool:
    """Whether the result is zero if these arguments are."""
    name, args = operation.name, operation.args
    if name in JOINS:
        return len(zeros) == len(args[0])
    if name == "constant_pad_nd":
        return not (args[2] if len(args) > 2 else 0)
    if name in PRODUCTS:
        return True
    if name == "convolution":
        return args[0] is zeros[0] and args[2] is None
    return (name in REARRANGEMENTS or name in ZERO_AT_ZERO) and args[0] is zeros[0]


def _branches(run: RecordedPass, blocks: Collection[str]) -> list[ResidualBranch]:
    """Return one branch per addition, in the order of the additions."""
    inside = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in run.model.named_modules()
        if _has_parameters(module) and any(_is_below(path, block) for block in blocks)
    }
    streams: list[tuple[str, TrackedInput]] = []  # of the blocks that run now
    candidates: dict[str, _ZeroOutput] = {}
    active: list[_ZeroOutput] = []
    calls: Counter[str] = Counter()
    for number, event in enumerate(run.events):
        if isinstance(event, Operation):
            for candidate in active:
                candidate.follow(event, number, lambda value: any(stream.has_all_of(value) for _, stream in streams))
            active = [candidate for candidate in active if not candidate.failed]
            for _, stream in streams:
                stream.track(event)
            continue
        if event.path in blocks and isinstance(event, Entered):
            streams.append((event.path, TrackedInput(event)))
        elif event.path in blocks:
            streams.pop()
            active = [candidate for candidate in active if candidate.block != event.path]
        if event.path in inside and isinstance(event, Left):
            calls[event.path] += 1
            if streams and (started := _started(event, streams[-1][0], active)):
                candidates[event.path] = started
                active.append(started)
    by_site: dict[int, _ZeroOutput] = {}
    for candidate in candidates.values():
        if not candidate.failed and len(candidate.sites) == 1 and calls[candidate.path] == 1:
            best = by_site.setdefault(candidate.sites[0], candidate)
            if inside[candidate.path] > inside[best.path]:
                by_site[candidate.sites[0]] = candidate
    return [ResidualBranch(one.path, one.block, one.shape, tuple(one.scaled)) for _, one in sorted(by_site.items())]


def _started(event: Left, block: str, active: Sequence[_ZeroOutput]) -> _ZeroOutput | None:
    """Return a module that has run as a candidate; record it with the candidates whose zeros it only passes on."""
    values, given = list(tensors_of(event.output)), [*tensors_of(event.args), *tensors_of(dict(event.kwargs))]
    shape = _output_shape(given[0], event.output) if values and given else None
    if shape is None:
        return None
    for candidate in active:
        if all(id(value) in candidate.zeros for value in [*given, *values]):
            candidate.scaled.append((event.path, shape))
    if values[0] is given[0]:
        return None
    return _ZeroOutput(event.path, block, shape, {id(values[0])}, set(map(id, values[1:])))


def _modules_without_effect(run: RecordedPass, branches: Sequence[ResidualBranch]) -> dict[str, dict[str, OutputShape]]:
    """Return by branch the modules without effect if it is removed: only the branch reads what they return."""
    in_block: dict[str, list[str]] = {}
    for branch in branches:
        in_block.setdefault(branch.block, []).append(branch.path)
    result: dict[str, dict[str, OutputShape]] = {branch.path: {} for branch in branches}
    running: list[str] = []  # branches that run now
    effects: dict[tuple[str, str], set[int]] = {}  # (branch, module): ids of tensors that depend on the module
    shapes: dict[str, OutputShape] = {}
    calls: Counter[str] = Counter()
    for event in run.events:
        if isinstance(event, Operation):
            for (path, _), reached in () if event.reads_shapes_only else effects.items():
                if path not in running:
                    spread(reached, event)
        elif isinstance(event, Entered):
            running += [event.path] if event.path in result else []
        else:
            for key in [key for key in effects if key[0] in in_block.get(event.path, ())]:
                reached = effects.pop(key)
                if not any(id(value) in reached for value in tensors_of(event.output)):
                    result[key[0]][key[1]] = shapes[key[1]]
            if event.path in result:
                running.pop()
            elif event.path and _has_parameters(event.module):
                calls[event.path] += 1
                given = event.args[0] if event.args and isinstance(event.args[0], Tensor) else None
                shape = None if given is None else _output_shape(given, event.output)
                if shape is not None and isinstance(event.output, Tensor) and not running:
                    shapes[event.path] = shape
                    for path in (
                        path for block in in_block if _is_below(event.path, block) for path in in_block[block]
                    ):
                        if not is_within(path, [event.path]):
                            effects[path, event.path] = {id(event.output)}
    return {path: {name: s for name, s in unused.items() if calls[name] == 1} for path, unused in result.items()}


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_below(path: str, block: str) -> bool:
    return path != block and is_within(path, [block])


def _outermost(unused: dict[str, OutputShape]) -> tuple[tuple[str, OutputShape], ...]:
    paths = [path for path in unused if not any(_is_below(path, other) for other in unused)]
    return tuple((path, unused[path]) for path in paths)


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
