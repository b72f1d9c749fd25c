"""Sets of channels that stand and fall together, found by running a model once.

Every tensor that the model computes carries labels of the channels that it holds; operations unite them: what is added,
multiplied or contracted with each other stands and falls together. Parameters have labels along each axis where they
are multiplied as matrices, and one per element elsewhere.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vitprune.architectures.tracing.op_rules import follow, propagate_to_fixpoint
from vitprune.architectures.tracing.trace import Trace
from vitprune.architectures.tracing.union_find import NONE
from vitprune.groups import ParamSlice
from vitprune.runtime.eval_mode import eval_mode

Place = tuple[str, int]  # a parameter and one of its axes
Signature = tuple[tuple[Place, int], ...]  # where a unit is, and how often


@dataclass(frozen=True)
class ChannelGroup:
    """Units that behave alike: where each of them is, and why they cannot go, if they cannot.

    `kind` is residual where two computed tensors are added up, attention where they are contracted over each other,
    ffn elsewhere. `writers` are the weights whose rows make the channels, in the order of the model.
    """

    kind: str
    units: int
    slices: tuple[ParamSlice, ...]
    buffers: tuple[ParamSlice, ...]
    writers: tuple[str, ...]
    why_not: str = ""


def channel_groups(model: nn.Module, example_input: Tensor) -> list[ChannelGroup]:
    """All sets of channels of a model whose units are on the same axes of the same parameters, in the model's order.

    example_input (1, C, H, W) is run through the model once, in evaluation mode.
    """
    found = _run(model, example_input)
    axes = _by_axis(found)
    places: dict[int, dict[Place, list[int]]] = defaultdict(dict)
    for place, labels in axes.items():
        for index, label in enumerate(labels.tolist()):
            if label != NONE:
                places[label].setdefault(place, []).append(index)
    alike: dict[Signature, list[int]] = defaultdict(list)
    for label, where in places.items():
        alike[tuple((place, len(indices)) for place, indices in sorted(where.items()))].append(label)
    sets = _Sets(
        found, axes, places, found.labels.roots(found.added), found.labels.roots(found.attended), found.labels.reasons()
    )
    order = {name: place for place, name in enumerate(found.writes)}
    made = [sets.channels(signature, labels, dict(model.named_buffers())) for signature, labels in alike.items()]
    return sorted(made, key=lambda one: min((order[name] for name in one.writers), default=len(order)))


def _by_axis(found: Trace) -> dict[Place, Tensor]:
    """Labels along the axes of parameters; of elements, along the one axis that they follow, if there is one."""
    axes = {place: found.labels.find(labels) for place, labels in found.axes.items()}
    for name, elements in found.elements.items():
        roots = found.labels.find(elements.contiguous())
        own = [axis for axis in range(roots.dim()) if _follows(roots, axis)]
        if own:
            axes[name, own[0]] = roots.movedim(own[0], 0).flatten(1)[:, 0] if roots.dim() > 1 else roots
        else:
            found.labels.mark_unprunable(roots, f"{name}: what belongs to a channel lies along none of its axes")
    return axes


def _follows(roots: Tensor, axis: int) -> bool:
    """Whether the labels follow this axis, whatever the others are."""
    flat = roots.movedim(axis, 0).reshape(roots.shape[axis], -1)
    return roots.shape[axis] > 1 and bool((flat == flat[:, :1]).all())


@dataclass(frozen=True)
class _Sets:
    """What the trace has found, by representatives of labels."""

    found: Trace
    axes: dict[Place, Tensor]
    places: dict[int, dict[Place, list[int]]]
    added: set[int]
    attended: set[int]
    reasons: dict[int, str]

    def channels(self, signature: Signature, labels: list[int], buffers: Mapping[str, Tensor]) -> ChannelGroup:
        """The units of one signature, in the order in which they lie in its first parameter."""
        writers = [name for name in self.found.writes if (name, 0) in (place for place, _ in signature)]
        first = (writers[0], 0) if writers else signature[0][0]
        labels = sorted(labels, key=lambda label: self.places[label][first])
        why = next((self.reasons[label] for label in labels if label in self.reasons), "")
        parts = []
        for place, _ in signature:
            part = _sliced(place, [self.places[label][place] for label in labels], len(self.axes[place]))
            if part is None:
                why = why or f"{place[0]}: not all of its channels are of one kind, or they are not evenly laid out"
            else:
                parts.append(part)
        marks = [
            kind for kind, marked in (("attention", self.attended), ("residual", self.added)) if labels[0] in marked
        ]
        own, others = (tuple(p for p in parts if (p.param in buffers) == held) for held in (False, True))
        return ChannelGroup((*marks, "ffn")[0], len(labels), own, others, tuple(writers), why)


def _sliced(place: Place, indices: list[list[int]], length: int) -> ParamSlice | None:
    """The address of units at these indices of an axis; None where they are not (outer, units, inner)."""
    grid = torch.tensor(indices)  # (units, outer * inner)
    units, count = grid.shape
    if units * count != length:
        return None
    for inner in (n for n in range(1, count + 1) if count % n == 0):
        wanted = torch.arange(length).view(count // inner, units, inner).transpose(0, 1).reshape(units, count)
        if torch.equal(grid, wanted):
            return ParamSlice(place[0], place[1], count // inner, inner)
    return None


def _run(model: nn.Module, example_input: Tensor) -> Trace:
    """Run a model on one image (1, C, H, W) and see what belongs together; channels of the answer are stuck."""
    found = Trace({**dict(model.named_parameters()), **dict(model.named_buffers())}, type(model).__name__)
    with eval_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _paths(model, found), _Tracer(found):
        answer = model(example_input)
    propagate_to_fixpoint(found)
    for value in answer if isinstance(answer, list | tuple) else [answer]:
        labels = found.of(value)
        if labels is not None:
            found.mark_unprunable(labels, "it is the answer")
    return found


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operation, after it has run, to the trace."""

    def __init__(self, found: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        follow(self._found, func, args, kwargs or {}, result)
        return result


@contextmanager
def _paths(model: nn.Module, found: Trace) -> Iterator[None]:
    """While this is open, the trace knows which module runs."""

    def enter(path: str) -> Callable[..., None]:
        return lambda module, given: found.paths.append(f"{path} ({type(module).__name__})")

    def leave(module: nn.Module, given: Any, output: Any) -> None:
        found.paths.pop()

    modules = [(path, module) for path, module in model.named_modules() if path]
    handles = [module.register_forward_pre_hook(enter(path)) for path, module in modules]
    handles += [module.register_forward_hook(leave) for _, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
