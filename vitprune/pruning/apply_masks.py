"""Apply the masks of a cycle to a model: weight update, zeros, removal of units."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Update
from vitprune.groups import Group, Masks, shrink, zero
from vitprune.pruning.block_steps import to_dense_names
from vitprune.pruning.cycle_masks import CycleState


@torch.no_grad()
def apply_masks(
    model: nn.Module, groups: Sequence[Group], masks: Masks, state: CycleState, update: Update | None
) -> None:
    """Update the remaining weights of a model, then zero single weights and cut out the other units, in place.

    Args:
        model: The model before the cycle.
        groups: Its groups.
        masks: Masks of the cycle, indexed as in the dense model.
        state: State before the cycle.
        update: Weight update; None for none.
    """
    names = to_dense_names(state.groups, groups, state.masks)
    weights = [group for group in groups if group.kind == "weight"]
    units = [group for group in groups if group.kind != "weight"]
    own_masks = {
        group.name: masks[names[group.name]].flatten()[state.masks[names[group.name]].flatten()].view(group.shape)
        for group in units
    }
    if update is not None:
        copy_params(model, update(own_masks | {group.name: masks[group.name] for group in weights}))
    zero(model, weights, masks)
    shrink(model, units, own_masks)


@torch.no_grad()
def copy_params(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of a model by name."""
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
