"""Removal of whole residual blocks, x + f(x), of any model: a removed block becomes an IdentityBlock."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.slices import not_prunable
from vitprune.architectures.tracing.example_run import NotRunningError, run_once, with_example
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.architectures.tracing.recorded_run import recorded
from vitprune.architectures.tracing.residual_branches import find_residual_modules
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within
from vitprune.runtime.outputs import tensors_of

_CACHE: StructureCache[tuple[str, ...] | BadInput] = StructureCache()


class IdentityBlock(nn.Module):
    """Replacement of a removed block: returns its first input."""

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Tensor:
        """Return the first input."""
        return x

    def set_input_size(self, *sizes: Any, **more: Any) -> None:
        """Do nothing; timm calls this method on every block of a Swin."""


def groups(model: nn.Module) -> list[Group]:
    """Find all removable blocks of a model, as one group.

    A removable block is a member of a Sequential or ModuleList, has two layers or more, and returns its first input
    plus something. If such blocks contain others, the inner ones are removable. Cached for models of one structure.

    Raises:
        BadInput: no block is removable (the message names one), or the model does not run without its blocks.
    """
    paths = _CACHE.value_for(model, _find_blocks)
    if isinstance(paths, BadInput):
        raise BadInput(str(paths))
    return [group_of(paths)]


def group_of(paths: Sequence[str]) -> Group:
    """Return the group of the blocks at these paths, in this order: both units of a block are the whole block."""
    sublayers = tuple((path,) for path in paths for _ in range(2))
    return Group("blocks", "block", (len(sublayers),), (), sublayers=sublayers, drop=partial(_remove, tuple(paths)))


def removed_blocks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the entries of a saved model's structure for its removed blocks: <path>.skipped, shape (1,)."""
    return {_entry(path): (1,) for path, module in model.named_modules() if type(module) is IdentityBlock}


def cuts_of(model: nn.Module, structure: Mapping[str, Sequence[int]]) -> list[tuple[Group, tuple[int, ...]]]:
    """Return the cut that removes the blocks named in a saved structure, if there are any.

    A cut keeps the first units of its group, so the kept blocks are the first ones of the group.

    Raises:
        BadInput: no block of the model is removable.
    """
    if not any(name.endswith(_entry("")) for name in structure):
        return []
    (group,) = groups(model)
    paths = [path for (path,) in group.sublayers[::2]]
    order = sorted(paths, key=lambda path: _entry(path) in structure)
    return [(group_of(order), (2 * sum(_entry(path) not in structure for path in paths),))]


def _entry(path: str) -> str:
    return f"{path}.skipped"


def _remove(paths: Sequence[str], model: nn.Module, keep: Tensor) -> None:
    for path, kept in zip(paths, keep[::2].tolist(), strict=True):
        if not kept:
            model.set_submodule(path, IdentityBlock())


def _find_blocks(model: nn.Module) -> tuple[str, ...] | BadInput:
    """Paths of the removable blocks, or the error if there are none."""
    members = block_members(model)
    try:
        residual = find_residual_modules(recorded(model), dict.fromkeys(members))
    except BadInput as error:
        return error
    paths = _innermost([path for path in members if path in residual])
    if not paths:
        return _refusal(model, members)
    why = why_not_without(model, lambda copy: _remove(paths, copy, torch.zeros(2 * len(paths), dtype=torch.bool)))
    return BadInput(f"{type(model).__name__}: without its blocks it does not run as before ({why})") if why else paths


def why_not_without(model: nn.Module, remove: Callable[[nn.Module], None]) -> str:
    """Return why a model does not run as before after a removal of modules; empty if it does.

    Args:
        model: The model; it is not changed.
        remove: Removes modules from a copy.
    """

    def shapes(copy: nn.Module, inputs: Tensor) -> list[torch.Size]:
        remove(copy)
        return [value.shape for value in tensors_of(run_once(copy, inputs))]

    try:
        before, after = [value.shape for value in tensors_of(recorded(model).output)], with_example(model, shapes)
    except NotRunningError as error:
        return error.reason
    return "" if before == after else "its outputs have other shapes"


def block_members(model: nn.Module) -> list[str]:
    """Return the paths of all members of a Sequential or ModuleList with two layers or more.

    A module with a removed block inside is not among them.
    """
    result = []
    for path, module in model.named_modules():
        if not path or not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Sequential | nn.ModuleList):
            continue
        layers = sum(parameter.dim() > 1 for parameter in module.parameters())
        if layers > 1 and not any(type(inner) is IdentityBlock for inner in module.modules()):
            result.append(path)
    return result


def _innermost(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if not any(is_within(other, [path]) for other in paths if other != path))


def _refusal(model: nn.Module, members: Sequence[str]) -> BadInput:
    name = type(model).__name__
    if not members:
        return BadInput(f"{name}: there is no block in it, so it has no groups of kind 'block'")
    first = _innermost(members)[0]
    why = f"neither it nor any other block of {name} returns its input plus something"
    return not_prunable(first, model.get_submodule(first), why)
