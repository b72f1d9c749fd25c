"""Whole blocks of any model: those that give back what they are given with something added can be skipped."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitprune.architectures.parts import refuse
from vitprune.architectures.tracing.cache import Shapes, images, line, shapes
from vitprune.architectures.tracing.residual_branches import adding
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within, meta_copy
from vitprune.runtime.eval_mode import eval_mode

_KNOWN: WeakKeyDictionary[nn.Module, tuple[Shapes, tuple[str, ...] | BadInput]] = WeakKeyDictionary()


class IdentityBlock(nn.Module):
    """Where a block was: the first of what it is given goes on."""

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Tensor:
        """The first input, as it is."""
        return x

    def set_input_size(self, *sizes: Any, **more: Any) -> None:
        """Nothing here depends on a size; timm tells it to every block of a Swin."""


def groups(model: nn.Module) -> list[Group]:
    """All blocks that can be skipped, as one group; what else is in the model stays.

    A block is a member of a Sequential or ModuleList, of two layers or more, that gives back the first of what it is
    given, all of it in its place, with something added. Of blocks within blocks, the inner ones count.

    Raises:
        BadInput: there are none, and one that is not is named; or the model does not run without them.
    """
    state = shapes(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != state:
        _KNOWN[model] = known = (state, _looked_up(model))
    if isinstance(known[1], BadInput):
        raise BadInput(str(known[1]))
    return [group_of(known[1])]


def group_of(paths: Sequence[str]) -> Group:
    """The group of the blocks at these paths, in their order: both units of a block are the block."""
    units = tuple((path,) for path in paths for _ in range(2))
    return Group("blocks", "block", (len(units),), (), sublayers=units, drop=partial(_skip, tuple(paths)))


def recorded(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a saved model's structure says of the blocks that are skipped: their names."""
    return {_entry(path): (1,) for path, module in model.named_modules() if type(module) is IdentityBlock}


def cuts(model: nn.Module, wanted: Mapping[str, Sequence[int]]) -> list[tuple[Group, tuple[int, ...]]]:
    """The cut that skips the blocks that a structure names, if it names any; those that stay come first in its group.

    Raises:
        BadInput: no block of the model can be skipped.
    """
    if not any(name.endswith(_entry("")) for name in wanted):
        return []
    (group,) = groups(model)
    paths = [path for (path,) in group.sublayers[::2]]
    order = sorted(paths, key=lambda path: _entry(path) in wanted)
    return [(group_of(order), (2 * sum(_entry(path) not in wanted for path in paths),))]


def _entry(path: str) -> str:
    return f"{path}.skipped"


def _skip(paths: Sequence[str], model: nn.Module, keep: Tensor) -> None:
    for path, stays in zip(paths, keep[::2].tolist(), strict=True):
        if not stays:
            model.set_submodule(path, IdentityBlock())


def _looked_up(model: nn.Module) -> tuple[str, ...] | BadInput:
    """Paths of the blocks that can be skipped, or why none can."""
    small, members = meta_copy(model), _members(model)
    try:
        given = images(small)
        found = adding(small, given, members)
    except Exception as error:  # whatever a forward pass says to tensors without values
        return BadInput(f"{type(model).__name__}: it does not run on shapes alone ({line(error)})")
    paths = _innermost([path for path in members if path in found])
    if not paths:
        return _refusal(model, members)
    _skip(paths, small, torch.zeros(2 * len(paths), dtype=torch.bool))
    try:
        with torch.no_grad(), eval_mode(small):
            small(given)
    except Exception as error:
        return BadInput(f"{type(model).__name__}: without its blocks it does not run on shapes alone ({line(error)})")
    return paths


def _members(model: nn.Module) -> list[str]:
    """Paths of all members of a Sequential or ModuleList that have two layers or more and no skipped block in them."""
    found = []
    for path, module in model.named_modules():
        within = isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Sequential | nn.ModuleList)
        layers = sum(parameter.dim() > 1 for parameter in module.parameters())
        if path and within and layers > 1 and not any(type(inner) is IdentityBlock for inner in module.modules()):
            found.append(path)
    return found


def _innermost(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if not any(is_within(other, [path]) for other in paths if other != path))


def _refusal(model: nn.Module, members: Sequence[str]) -> BadInput:
    name = type(model).__name__
    if not members:
        return BadInput(f"{name}: there is no block in it, so it has no groups of kind 'block'")
    first = _innermost(members)[0]
    why = f"neither it nor any other block of {name} gives back what it is given with something added"
    return refuse(first, model.get_submodule(first), why)
