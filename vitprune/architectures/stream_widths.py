"""Modules with inferred widths in a narrower residual stream: found at the errors of a trial, and proven on values.

A trial on shapes does not see, for example, a scale that is computed from the width of the input. Equal modules are
proven once.
"""

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from timm.models.metaformer import Scale
from torch import Tensor, nn

from vitprune.architectures.inferred_widths import Classes, Observed, observed_sizes, set_class, with_inferred
from vitprune.architectures.size_attributes import TOLERANCE, nearly_equal, random_module, with_values
from vitprune.architectures.tracing.example_run import run_once
from vitprune.architectures.tracing.fingerprint import fingerprint
from vitprune.architectures.tracing.recorded_run import Call, recorded
from vitprune.groups import CHANNEL_NORMS, Group, is_within, meta_copy, positions, resize_group, shrink, zero
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.outputs import tensors_of

MAX_CHANGES, MAX_AXES = 24, 64
NOTHING: tuple[tuple[str, int], tuple[tuple[int, ...], ...]] = (("", 0), ((), (), ()))
_Axis = tuple[int, Tensor]  # an axis of a tensor, and its positions that are kept


def classes_after_errors(groups: Sequence[Group], model: nn.Module, inputs: Tensor) -> Classes:
    """Return classes for narrower streams; after every failed run, the reshape that failed infers its size.

    All modules of a class get the same sizes inferred.

    Args:
        groups: The residual streams, of which a third is removed.
        model: A copy of the model.
        inputs: Its input.

    Returns:
        Path and class of the modules; empty if an error is not one of such a reshape.
    """
    kinds: dict[Any, Any] = {}
    dense: dict[str, Observed] = {}
    widths = {group.units for group in groups}
    for _ in range(MAX_CHANGES):
        path, failed = _first_error(_narrower(model, groups, kinds), inputs)
        if not failed:
            return tuple((path, kinds[type(one)]) for path, one in model.named_modules() if type(one) in kinds)
        kind = type(model.get_submodule(path))
        if path not in dense:
            dense[path] = _observed(meta_copy(model), path, inputs)
        wrong = _wrong_size(dense[path], _observed(_narrower(model, groups, kinds), path, inputs), widths)
        if wrong is None:
            break
        kinds[kind] = with_inferred(kinds.get(kind, kind), *wrong)
    return ()


def _narrower(model: nn.Module, groups: Sequence[Group], kinds: dict[Any, Any]) -> nn.Module:
    copied = meta_copy(model)
    for group in groups:
        resize_group(copied, group, (group.units - group.units // 3,))
    for module in copied.modules():
        if type(module) in kinds:
            set_class(module, kinds[type(module)])
    return copied


def _first_error(model: nn.Module, inputs: Tensor) -> tuple[str, bool]:
    """Return the path of the innermost module that fails, and whether one does."""
    running = [""]

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: running.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    for path, module in model.named_modules():
        if path:
            module.register_forward_pre_hook(enter(path))
            module.register_forward_hook(leave)
    try:
        run_once(model, inputs)
    except Exception:  # a forward pass may raise anything
        return running[-1], True
    return "", False


def _observed(model: nn.Module, path: str, inputs: Tensor) -> Observed:
    return observed_sizes(model.get_submodule(path), lambda: _first_error(model, inputs))


def _wrong_size(dense: Observed, narrow: Observed, widths: set[int]) -> tuple[str, int, int] | None:
    """Return the size that does not fit in the last reshape of a module that fails; None if its reshapes fit.

    It is one that changed with the stream, though the reshaped tensor did not, else one that is a width of a stream.
    """
    (method, call), (_, given, shape) = next(reversed(narrow.items()), NOTHING)
    before, elements = dense.get((method, call), NOTHING[1])[1], prod(shape)
    if prod(given) == elements or len(before) != len(given) or -1 in given:
        return None
    fitting = [position for position, size in enumerate(given) if elements % max(1, prod(given) // max(1, size)) == 0]
    changed = [position for position in fitting if given[position] != before[position]]
    chosen = changed or [position for position in fitting if given[position] in widths]
    return (method, call, chosen[-1]) if chosen else None


def record_scales(model: nn.Module) -> None:
    """Record the width of every scale of timm's MetaFormer, whose shape is an attribute."""
    for module in model.modules():
        if isinstance(module, Scale):
            module.shape = (len(module.scale), *module.shape[1:])


def prove_classes(groups: Sequence[Group], classes: Classes, model: nn.Module) -> str:
    """Prove the classes of modules for narrower residual streams; return which module computes something else.

    Args:
        groups: The residual streams, of which a third is removed for the proof.
        classes: The modules with another class. Those inside another one are proven with it.
        model: The model.

    Returns:
        A description of the module; empty if all are proven.
    """
    outer = [path for path, _ in classes if not any(is_within(path, [other]) for other, _ in classes if other != path)]
    calls = recorded(model).calls(outer)
    proven: dict[Hashable, bool] = {}
    for path in outer:
        inner = tuple(
            (name.removeprefix(path).removeprefix("."), kind) for name, kind in classes if is_within(name, [path])
        )
        module, parts = model.get_submodule(path), list(_inside(groups, path))
        key = (fingerprint(module) or path, inner, tuple(part.slices for part in parts), repr(calls.get(path)))
        if key not in proven:
            proven[key] = path not in calls or _is_proven(module, inner, parts, calls[path])
        if not proven[key]:
            return f"{path} ({type(module).__name__}): with a narrower residual stream it computes something else"
    return ""


def _inside(groups: Sequence[Group], path: str) -> Iterator[Group]:
    """Yield the groups with the slices that are inside a module, named relative to it."""
    for group in groups:
        slices, buffers = (
            tuple(
                replace(part, param=part.param.removeprefix(f"{path}." if path else ""))
                for part in parts
                if is_within(part.param, [path])
            )
            for parts in (group.slices, group.buffers)
        )
        yield Group(group.name, "ffn", group.shape, slices, buffers=buffers)


def _is_proven(owner: nn.Module, classes: Classes, groups: Sequence[Group], call: Call) -> bool:
    """Whether the narrower module equals the module with removed channels of zeros, in float64, for its inputs.

    Norms are left out of the comparison except for their scale and shift: they count channels, and by definition those
    of a narrower stream are fewer.
    """
    masks = {group.name: torch.arange(group.units) >= group.units // 3 for group in groups}
    dense = random_module(owner)
    narrow = shrink(copy.deepcopy(dense), groups, masks)
    for path, kind in classes:
        set_class(narrow.get_submodule(path), kind)
    record_scales(narrow)
    zero(dense, groups, masks)
    for module in (*dense.modules(), *narrow.modules()):
        if isinstance(module, CHANNEL_NORMS):
            setattr(module, "forward", partial(_scale_and_shift, module))  # noqa: B010
    lengths = {
        group.units * part.length: positions(part, masks[group.name]) for group in groups for part in group.slices
    }
    lengths |= {group.units: masks[group.name].nonzero().flatten() for group in groups}
    values = [with_values(part, torch.Generator().manual_seed(0)) for part in call]
    floating = [value for value in tensors_of(values) if value.is_floating_point()]
    options = [_axes(value, lengths) for value in floating]
    for axes in itertools.islice(itertools.product(*options), MAX_AXES):
        chosen = {id(value): axis for value, axis in zip(floating, axes, strict=True) if axis is not None}
        if _are_equal(dense, narrow, values, chosen, lengths):
            return True
    return False


def _axes(value: Tensor, lengths: dict[int, Tensor]) -> list[_Axis | None]:
    """Return the axes of a tensor that may be those of a stream, the last one first, and None for no such axis."""
    axes = [(axis, lengths[size]) for axis, size in enumerate(value.shape) if size in lengths]
    return [*axes[::-1], None]


def _are_equal(
    dense: nn.Module, narrow: nn.Module, values: Sequence[Any], axes: dict[int, _Axis], lengths: dict[int, Tensor]
) -> bool:
    outputs = []
    for module, is_narrow in ((dense, False), (narrow, True)):
        args, kwargs = (_cut(part, axes, is_narrow) for part in values)
        try:
            with torch.no_grad(), eval_mode(module):
                outputs.append(next(tensors_of(module(*args, **kwargs))))
        except Exception:  # the axes do not fit
            return False
    expected, output = outputs
    for axis, (size, left) in enumerate(zip(expected.shape, output.shape, strict=False)):
        if size != left and size in lengths:
            expected = expected.index_select(axis, lengths[size])
    return nearly_equal(output, expected, TOLERANCE)


def _cut(value: Any, axes: dict[int, _Axis], is_narrow: bool) -> Any:
    """Return arguments whose removed channels are cut out, or are zero."""
    if isinstance(value, Tensor) and id(value) in axes:
        axis, kept = axes[id(value)]
        part = value.index_select(axis, kept)
        return part if is_narrow else torch.zeros_like(value).index_copy(axis, kept, part)
    if isinstance(value, dict):
        return {key: _cut(item, axes, is_narrow) for key, item in value.items()}
    return type(value)(_cut(item, axes, is_narrow) for item in value) if type(value) in (tuple, list) else value


def _scale_and_shift(norm: Any, x: Tensor) -> Tensor:
    across = (-1,) + (1,) * (x.dim() - 2 if type(norm).__name__.endswith("2d") else 0)
    for name, apply in (("weight", torch.mul), ("bias", torch.add)):
        value = getattr(norm, name, None)
        x = x if value is None else apply(x, value.view(across))
    return x
