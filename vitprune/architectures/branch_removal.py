"""Removal of the attention branch or the MLP branch of a residual block alone: the branch returns zeros."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.architectures.block_removal import block_members, why_not_without
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.architectures.tracing.recorded_run import recorded
from vitprune.architectures.tracing.zero_branches import OutputShape, ResidualBranch, find_branches
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within
from vitprune.runtime.outputs import tensors_of

_CACHE: StructureCache[tuple[ResidualBranch, ...] | BadInput] = StructureCache()
SUFFIX = ".removed"


class ZeroBranch(nn.Module):
    """Replacement of the main module of a removed branch: returns zeros of the shape that the module returned.

    Its block may read sizes from it, so it has the numbers and texts that the module had.

    Args:
        module: The module.
        shape: Shape of its output. Of several outputs, all but the first become None.
    """

    def __init__(self, module: nn.Module, shape: OutputShape) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, bool | int | float | str):
                setattr(self, name, value)
        self.output_shape = shape

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """Return zeros."""
        zeros, outputs = (
            _zeros(next(tensors_of([*inputs, *more.values()])), self.output_shape),
            self.output_shape.outputs,
        )
        return (zeros, *[None] * (outputs - 1)) if outputs else zeros

    def set_window_size(self, *sizes: Any, **more: Any) -> None:
        """Do nothing; timm calls this method on every attention of a Swin."""


class UnusedLayer(nn.Module):
    """Replacement of a module without effect beside a removed branch: returns its input, or zeros if shapes differ.

    Args:
        module: The module.
        shape: Shape of its output.
    """

    def __init__(self, module: nn.Module, shape: OutputShape) -> None:
        super().__init__()
        self.output_shape = shape
        empty = next(module.parameters()).new_empty(0)  # timm asks the weight of a norm for its device
        self.register_buffer("weight", empty, persistent=False)

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Tensor:
        """Return a tensor of the shape of the module's output."""
        return x if self.output_shape.length is None else _zeros(x, self.output_shape)

    def set_window_size(self, *sizes: Any, **more: Any) -> None:
        """Do nothing: no windows are computed here."""


def groups(model: nn.Module) -> list[Group]:
    """Find all removable branches of the residual blocks of a model, as one group.

    A branch is a module in a block whose output, directly or scaled, is added to the stream that the block was given,
    and is used for nothing else. Cached for models of one structure.

    Raises:
        BadInput: there is none, or the model does not run without them.
    """
    branches = _CACHE.value_for(model, _find)
    if isinstance(branches, BadInput):
        raise BadInput(str(branches))
    return [_group_of(branches)]


def removed_branches(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the entries of a saved model's structure for its removed branches: <path>.removed, shape (1,)."""
    return {path + SUFFIX: (1,) for path, module in model.named_modules() if type(module) is ZeroBranch}


def branch_cuts(model: nn.Module, structure: Mapping[str, Sequence[int]]) -> list[tuple[Group, tuple[int, ...]]]:
    """Return the cut that removes the branches named in a saved structure, if there are any.

    A cut keeps the first units of its group, so the kept branches are the first ones of the group.

    Raises:
        BadInput: no branch of the model is removable.
    """
    if not any(name.endswith(SUFFIX) for name in structure):
        return []
    groups(model)
    branches = _CACHE.value_for(model, _find)
    assert not isinstance(branches, BadInput)
    order = sorted(branches, key=lambda branch: branch.path + SUFFIX in structure)
    return [(_group_of(order), (sum(branch.path + SUFFIX not in structure for branch in branches),))]


def _group_of(branches: Sequence[ResidualBranch]) -> Group:
    sublayers = tuple((branch.path, *(path for path, _ in branch.unused)) for branch in branches)
    return Group("branches", "branch", (len(branches),), (), sublayers=sublayers, drop=partial(_drop, tuple(branches)))


def _drop(branches: Sequence[ResidualBranch], model: nn.Module, keep: Tensor) -> None:
    for branch, kept in zip(branches, keep.tolist(), strict=True):
        if not kept:
            model.set_submodule(branch.path, ZeroBranch(model.get_submodule(branch.path), branch.shape))
            for path, shape in branch.unused:
                model.set_submodule(path, UnusedLayer(model.get_submodule(path), shape))


def _zeros(x: Tensor, shape: OutputShape) -> Tensor:
    if shape.length is None:
        return torch.zeros_like(x)
    sizes = list(x.shape)
    sizes[shape.axis] = shape.length
    return x.new_zeros(sizes)


def _find(model: nn.Module) -> tuple[ResidualBranch, ...] | BadInput:
    """Return the branches of a model, or the error if there are none."""
    name, members = type(model).__name__, block_members(model)
    if not members:
        return BadInput(f"{name}: there is no block in it, so it has no groups of kind 'branch'")
    inner = [
        path for path, module in model.named_modules() if is_within(path, members) and len(list(module.children())) > 1
    ]
    try:
        branches = find_branches(recorded(model), dict.fromkeys(members + inner))
    except BadInput as error:
        return error
    if not branches:
        why = "no module of its blocks is added alone to what the block was given"
        return BadInput(f"{name}: {why}, so it has no groups of kind 'branch'")
    why = why_not_without(model, lambda copy: _drop(branches, copy, torch.zeros(len(branches), dtype=torch.bool)))
    return BadInput(f"{name}: without its branches it does not run as before ({why})") if why else tuple(branches)
