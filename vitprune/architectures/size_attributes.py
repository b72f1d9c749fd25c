"""Find the attributes of a module from which its forward pass reads sizes, by trial on shapes and proof on values.

When units of a module are cut out, attributes such as num_heads, head_dim or scale have to change with the shapes. They
are not listed per class: the smallest set of attributes is searched with which the cut module runs on the meta device,
and the result is proven in float64 with random weights: cutting units out equals setting them to zero.
"""

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.inferred_widths import Classes, inferring_classes, restore_class, set_class
from vitprune.architectures.narrow_attention import narrow_class
from vitprune.architectures.tracing.meta_operations import RememberedShapes
from vitprune.architectures.tracing.recorded_run import Call
from vitprune.config.prune_config import APART
from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice, Projections, index_grid, meta_copy, resize_group, shrink, zero
from vitprune.runtime.eval_mode import drop_cached, eval_mode
from vitprune.runtime.messages import first_line
from vitprune.runtime.outputs import tensors_of
from vitprune.runtime.random_parameters import random_numbers, randomize_parameters

MAX_CHANGED, MAX_TRIALS = 5, 400
TOLERANCE, BASIS_TOLERANCE = 1e-9, 1e-6  # relative, in float64; the latter after inverses of matrices
HEADS, WIDTH, BOTH, SCALE = "heads", "width", "heads and width", "scale"


@dataclass(frozen=True)
class SizeAttribute:
    """An attribute that holds a size.

    Attributes:
        path: Path of the module below the owner.
        name: Name of the attribute; config.NAME for an entry of the module's configuration, of which it gets a copy.
        index: Position in a tuple or list; None for a number.
        role: heads, width (channels of a head) or both for a multiple of it, or scale for width ** -0.5.
        value: Value before the cut.
    """

    path: str
    name: str
    index: int | None
    role: str
    value: float

    @property
    def place(self) -> tuple[str, str, int | None]:
        """Module, name and position."""
        return self.path, self.name, self.index

    def __str__(self) -> str:
        where = f"{self.path}.{self.name}" if self.path else self.name
        return where if self.index is None else f"{where}[{self.index}]"


@dataclass(frozen=True)
class Sizes:
    """How a module records the sizes of a group.

    Attributes:
        shape: Heads and channels of a head before the cut.
        attributes: Attributes that change with the shape.
        queries: Parameters with rows of queries, each with the repetition of the units that they are. They are scaled
            where the forward pass scales the logits by width ** -0.5, so that the product of both scales remains.
        classes: Paths of modules that get a forward pass for any width, with the class that has it.
    """

    shape: tuple[int, int]
    attributes: tuple[SizeAttribute, ...] = ()
    queries: tuple[tuple[ParamSlice, int], ...] = ()
    classes: Classes = ()

    def record(self, owner: nn.Module, shape: tuple[int, ...]) -> None:
        """Record a new shape, (heads,) or (heads, width), in the module and scale its queries."""
        heads, width = (*shape, self.shape[1])[:2]
        if (heads, width) == self.shape:
            return
        for path, kind in self.classes:
            set_class(owner.get_submodule(path), kind)
        for attribute in self.attributes:
            _set(owner, attribute, self._new_value(attribute, heads, width))
        for module in owner.modules():
            restore_class(module)
        drop_cached(owner)
        if width != self.shape[1]:
            scales = [attribute.value for attribute in self.attributes if attribute.role == SCALE]
            factor = scales[0] / width**-0.5 if scales else math.sqrt(width / self.shape[1])
            for part, repetition in self.queries:
                _scale_rows(owner, part, repetition, heads * width, factor)

    def _new_value(self, attribute: SizeAttribute, heads: int, width: int) -> float:
        if attribute.role == SCALE:
            return float(width**-0.5)  # as forward passes compute it, to the last bit
        old, new = 1, 1
        if attribute.role in (HEADS, BOTH):
            old, new = self.shape[0], heads
        if attribute.role in (WIDTH, BOTH):
            old, new = old * self.shape[1], new * width
        return int(attribute.value) // old * new

    def with_heads(self, heads: "Sizes") -> "Sizes":
        """Return the sizes of channels that record a number of heads too, as those of whole heads do."""
        places = [{one.place for one in sizes.attributes if one.role != SCALE} for sizes in (self, heads)]
        both = places[0] & places[1]
        attributes = [replace(one, role=BOTH) if one.place in both else one for one in self.attributes]
        attributes += [one for one in heads.attributes if one.place not in both]
        return replace(self, attributes=tuple(attributes), classes=tuple(dict([*heads.classes, *self.classes]).items()))


def sized(group: Group, owner: nn.Module, call: Call, sizes: Sizes) -> Group:
    """Return a group of heads or channels whose `resize` records new sizes, after a proof.

    Args:
        group: The group; the names of its slices are relative to the owner.
        owner: The module, whose parameters may be on the meta device.
        call: Arguments of its forward pass, tensors on the meta device.
        sizes: Heads and width, and the rows of queries.

    Returns:
        The group with `resize`.

    Raises:
        BadInput: no set of attributes gives a module that runs and equals the module with zeros; the message says what
            was tried.
    """
    candidates = list(_candidates(owner, group, sizes.shape))
    tried: list[str] = []
    classes = partial(_other_classes, owner, group, call)
    wanted = _output_shape(without_values(owner), call)
    for proposal in _proposals(_alike(owner, candidates), sizes, classes, len(group.shape) > 1):
        resized = replace(group, resize=proposal.record)
        error = _trial(owner, call, resized, wanted)
        if not error and _is_proven(owner, call, resized):
            return resized
        tried.append(error or "its output differs from that of the module with zeros")
    names = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates)) or "no attribute"
    raise BadInput(f"its forward pass needs the old sizes; tried to change {names} ({tried[-1] if tried else ''})")


def _alike(owner: nn.Module, candidates: Sequence[SizeAttribute]) -> list[tuple[SizeAttribute, ...]]:
    """Return attributes that change together: those of one name in modules of one class, such as several attentions.

    If there are such modules, the attributes of the owner, which may be a whole model, come last.
    """
    alike: dict[Hashable, list[SizeAttribute]] = {}
    for one in candidates:
        alike.setdefault((type(owner.get_submodule(one.path)), one.name, one.index, one.role, one.value), []).append(
            one
        )
    several = any(len(members) > 1 for members in alike.values())
    return sorted(map(tuple, alike.values()), key=lambda members: several and not members[0].path)


def _proposals(
    candidates: Sequence[tuple[SizeAttribute, ...]],
    sizes: Sizes,
    classes: Callable[[], list[Classes]],
    of_channels: bool,
) -> Iterator[Sizes]:
    """Yield proposals, those that change the fewest attributes first; other forward passes are the last resort."""
    scales = tuple(one for alike in candidates for one in alike if one.role == SCALE) if of_channels else ()
    others = [alike for alike in candidates if alike[0].role != SCALE]
    ways = [((), ()), (scales, sizes.queries if of_channels else ())]
    chosen = [
        tuple(itertools.chain.from_iterable(one))
        for length in range(min(MAX_CHANGED, len(others)) + 1)
        for one in itertools.combinations(others, length)
    ]
    for of_modules in itertools.chain([()], _made_when_needed(classes)):
        for attributes in chosen[: MAX_TRIALS // 4]:
            for more, queries in dict.fromkeys(reversed(ways) if scales else ways):
                yield Sizes(sizes.shape, attributes + more, queries, of_modules)


def _made_when_needed(classes: Callable[[], list[Classes]]) -> Iterator[Classes]:
    yield from classes()


def _other_classes(owner: nn.Module, group: Group, call: Call) -> list[Classes]:
    """Return the classes for any width of the modules that have one, written by hand or by rewriting."""
    named = [(path, narrow_class(module, group.kind in APART)) for path, module in owner.named_modules()]
    by_hand = tuple((path, kind) for path, kind in named if kind is not type(owner.get_submodule(path)))
    copied = without_values(owner)
    lengths = {group.units * part.length for part in group.slices if part.axis is not None}
    sizes = lengths | {length // number for length in lengths for number in (3, *group.shape) if length % number == 0}
    run = partial(_output_shape, copied, call)
    left_out = [path for path, _ in by_hand]
    rewritten = [inferring_classes(copied, sizes - {1}, run, left_out, largest) for largest in (False, True)]
    return [classes for classes in dict.fromkeys((by_hand, *rewritten)) if classes]


def _candidates(owner: nn.Module, group: Group, shape: tuple[int, int]) -> Iterator[SizeAttribute]:
    """Yield the attributes of the module that hold a number of heads or of channels, or a scale."""
    heads, width = shape
    role, unit = (HEADS, heads) if len(group.shape) == 1 else (WIDTH, width)
    lengths = {group.units * part.length for part in group.slices if part.axis is not None}
    sizes = {unit, heads * width} | lengths | {length // width for length in lengths if role == HEADS}
    sizes -= {0}
    for path, module in owner.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
            continue  # groups.shrink records their sizes
        for name, value in _settings(module):
            for index, number in enumerate(value) if isinstance(value, tuple | list) else ((None, value),):
                if type(number) is int and number in sizes and number % unit == 0:
                    yield SizeAttribute(path, name, index, role, number)
                elif "scal" in name and type(number) is float and math.isclose(number, width**-0.5):
                    yield SizeAttribute(path, name, index, SCALE, number)


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    config = vars(module).get("config")
    entries = [(f"config.{name}", value) for name, value in vars(config).items()] if config is not None else []
    for name, value in [*vars(module).items(), *entries]:
        is_short = isinstance(value, tuple | list) and 0 < len(value) <= 4
        if type(value) in (int, float) or is_short:
            yield name, value


def _set(owner: nn.Module, attribute: SizeAttribute, value: float) -> None:
    module: Any = owner.get_submodule(attribute.path)
    name, target = attribute.name, module
    if name.startswith("config."):
        module.config = target = copy.copy(module.config)
        name = name.removeprefix("config.")
    if attribute.index is not None:
        entries = list(getattr(target, name))
        entries[attribute.index] = value
        setattr(target, name, type(getattr(target, name))(entries))
    else:
        setattr(target, name, value)


@torch.no_grad()
def _scale_rows(owner: nn.Module, part: ParamSlice, repetition: int, units: int, factor: float) -> None:
    """Multiply the rows of one repetition of all units of a parameter, which is already cut."""
    parameter, grid = owner.get_parameter(part.param), (part.start or 0) + index_grid(part, units)
    rows = (grid[repetition] if part.runs == 1 else grid[:, :, repetition]).flatten()
    parameter[rows.to(parameter.device)] *= factor


def _smaller(group: Group) -> tuple[int, ...]:
    """A smaller shape for the trial."""
    last = group.shape[-1]
    return (*group.shape[:-1], last - max(1, last // 3))


def _trial(owner: nn.Module, call: Call, group: Group, wanted: Sequence[int]) -> str:
    """Return the error of a cut module on the meta device; empty if its output has the wanted shape."""
    copied = without_values(owner)
    try:
        resize_group(copied, group, _smaller(group))
        shape = _output_shape(copied, call)
    except Exception as error:  # a forward pass may raise anything
        return first_line(error)
    return "" if shape == wanted else f"its output has shape {tuple(shape)} instead of {tuple(wanted)}"


def without_values(owner: nn.Module) -> nn.Module:
    """Return a copy of a module on the meta device, in float64 as the arguments of its calls.

    Args:
        owner: The module.
    """
    copied = meta_copy(owner)
    copied.double()
    return copied


def _output_shape(module: nn.Module, call: Call) -> Sequence[int]:
    args, kwargs = call
    with torch.no_grad(), eval_mode(module), RememberedShapes():
        return next(tensors_of(module(*args, **kwargs))).shape


def _is_proven(owner: nn.Module, call: Call, group: Group) -> bool:
    """Whether the module with some units cut out equals the module with these units zero, in float64."""
    dense = random_module(owner)
    kept = _smaller(group)
    keep = torch.zeros(group.shape, dtype=torch.bool)
    keep[..., group.shape[-1] - kept[-1] :] = True  # not the first units
    zeroed, cut = zero(copy.deepcopy(dense), [replace(group, resize=None)], {group.name: keep}), copy.deepcopy(dense)
    shrink(cut, [group], {group.name: keep})
    return _same_outputs(zeroed, cut, call, TOLERANCE)


def _same_outputs(first: nn.Module, second: nn.Module, call: Call, tolerance: float) -> bool:
    """Whether two modules have the same first output for random arguments."""
    outputs = []
    for module in (first, second):
        args, kwargs = (with_values(part, torch.Generator().manual_seed(0)) for part in call)
        with torch.no_grad(), eval_mode(module):
            outputs.append(next(tensors_of(module(*args, **kwargs))))
    expected, output = outputs
    return nearly_equal(output, expected, tolerance)


def nearly_equal(output: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether two tensors have one shape and differ by a fraction of the largest expected number at most.

    Args:
        output: A tensor.
        expected: The tensor that it should be.
        tolerance: The fraction.
    """
    return expected.shape == output.shape and torch.allclose(
        output, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def keeps_function_in_other_basis(owner: nn.Module, call: Call, projections: Projections, reader: str) -> bool:
    """Return whether q A^-1, k A^T, v B and B^-1 in the reading layer give the same output, for random A and B.

    All of these layers must be called as modules, with tensors of equally many axes for q, k and v, as criteria do that
    record them.

    Args:
        owner: The module, whose parameters may be on the meta device.
        call: Arguments of its forward pass, tensors on the meta device.
        projections: The layers of q, k and v below the owner.
        reader: Path of the Linear layer that reads the heads.
    """
    dense = random_module(owner)
    rotated = copy.deepcopy(dense)
    width = dense.get_parameter(f"{reader}.weight").shape[1] // projections.heads
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.eye(width).double() + 0.3 * torch.randn(2, width, width, generator=generator).double() / width**0.5
    )
    sides = (torch.linalg.inv(first), first.T, second.T)  # of the rows of q, k and v
    with torch.no_grad():
        for name, parameter in rotated.named_parameters():
            path, _, leaf = name.rpartition(".")
            chosen = [side for side, layer in zip(sides, projections.layers, strict=True) if layer == path]
            if chosen and leaf in ("weight", "bias"):
                matrices = torch.cat([side.expand(projections.heads, -1, -1) for side in chosen])
                parameter.copy_((matrices @ parameter.reshape(len(matrices), width, -1)).reshape(parameter.shape))
        weight = rotated.get_parameter(f"{reader}.weight")
        inverse = torch.linalg.inv(second).T
        weight.copy_((weight.reshape(len(weight), projections.heads, width) @ inverse).reshape(weight.shape))
    called: dict[str, int] = {}
    for path in {*projections.layers, reader}:
        dense.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, path=path: called.update({path: inputs[0].dim()})
        )
    same = _same_outputs(dense, rotated, call, BASIS_TOLERANCE)
    axes = {called.get(path) for path in projections.layers}
    return same and reader in called and len(axes) == 1 and None not in axes


def random_module(owner: nn.Module) -> nn.Module:
    """Return a copy of a module with random parameters and running statistics in float64, on the CPU."""
    module, values = meta_copy(owner), dict(owner.named_buffers())
    module.to_empty(device="cpu")
    for name, buffer in module.named_buffers():
        buffer.copy_(torch.zeros_like(buffer) if values[name].is_meta else values[name])
    return randomize_parameters(module)


def with_values(value: Any, generator: torch.Generator) -> Any:
    """Replace the meta tensors of arguments: numbers and masks by random ones, indices by zeros."""
    if isinstance(value, Tensor):
        noise = random_numbers(value.shape, generator)
        if value.dtype == torch.bool:
            return noise > 0
        return noise if value.is_floating_point() else torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, Mapping):
        return {key: with_values(item, generator) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_values(item, generator) for item in value)
    return value
