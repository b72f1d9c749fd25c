"""Data-free importance: random, magnitude (L1 of a weight, L2 of a unit) and energy (LAMP, DIMAP)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.errors import BadInput
from vitprune.groups import Group, unit_sums


def random(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score every unit by a uniform random number: the baseline."""
    generator = torch.Generator().manual_seed(context.seed)
    return Importance({g.name: torch.rand(g.shape, generator=generator, dtype=torch.float64) for g in groups})


def magnitude(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a single weight by |w|, a unit by the L2 norm of the weight rows that produce it.

    Columns and biases are excluded: on DeiT-Tiny the norm of all weights of a hidden unit ranks worse (docs/LOG.md).

    Source: Li et al. 2017, section 3.1.
    """
    rows = [group if group.kind == "weight" else _producers(model, group) for group in groups]
    squares = {name: parameter.detach().double().square() for name, parameter in parameters_of(model, rows).items()}
    return Importance({group.name: unit_sums(group, squares).sqrt() for group in rows})


def energy(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by w_(j)^2 / sum_{k<=j} w_(k)^2, |w_(1)| >= |w_(2)| >= ... sorted within its layer.

    Computed in float64; the score of a zero weight is 0.

    Raises:
        BadInput: a group is not of kind `weight`.

    Source: DIMAP equation 10; identical to LAMP (Lee et al. 2021).
    """
    named = parameters_of(model, groups)
    return Importance({group.name: _energy(_only_weight(group, named)) for group in groups})


def parameters_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """Return every parameter that the slices of the groups touch, by name.

    Raises:
        BadInput: a group has no slices (a block).
    """
    bare = [group.name for group in groups if not group.slices]
    if bare:
        raise BadInput(f"{bare[0]}: magnitude and taylor cannot score blocks; use a criterion that runs the model")
    names = dict.fromkeys(part.param for group in groups for part in group.slices)
    return {name: model.get_parameter(name) for name in names}


def _producers(model: nn.Module, group: Group) -> Group:
    """Restrict a group to its slices along the output axis of weight matrices and convolutions."""
    rows = [part for part in group.slices if part.axis == 0 and model.get_parameter(part.param).dim() > 1]
    return replace(group, slices=tuple(rows))


def _only_weight(group: Group, named: dict[str, nn.Parameter]) -> Tensor:
    if group.kind != "weight":
        raise BadInput(f"{group.name}: the energy score is for single weights, not for kind {group.kind!r}")
    return named[group.slices[0].param].detach().cpu()


def _energy(weight: Tensor) -> Tensor:
    ranked, order = _descending(weight.flatten())
    squares = ranked.double().square_()
    share = squares / squares.cumsum(0)  # descending: total - cumsum would cancel
    share.masked_fill_(squares == 0, 0.0)
    return torch.empty_like(share).scatter_(0, order, share).view(weight.shape)


def _descending(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Sort magnitudes in descending order and return them with their positions; ties as in `select`."""
    if flat.dtype == torch.float64:
        order = flat.abs().argsort(stable=True).flip(0)
        return flat.abs()[order], order
    # The bits of a non-negative float32 sort like the float itself, so magnitude and position are packed into one
    # int64: numpy sorts these many times faster than torch sorts pairs.
    keys = flat.float().abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys += torch.arange(len(flat))
    keys.numpy().sort()
    keys = keys.flip(0)
    return (keys >> 32).int().view(torch.float32), keys.bitwise_and_(0xFFFFFFFF)
