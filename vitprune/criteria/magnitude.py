"""Data-free importance: random, magnitude (L1 of a weight, L2 of a unit) and energy (LAMP, DIMAP)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoreConfig
from vitprune.errors import BadInput
from vitprune.groups import Group, unit_sums


def random(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score every unit by a draw from a uniform distribution: the baseline that knows nothing."""
    generator = torch.Generator().manual_seed(setting.seed)
    return Importance({g.name: torch.rand(g.shape, generator=generator, dtype=torch.float64) for g in groups})


def magnitude(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a single weight by its absolute value, a unit by the L2 norm of the weight rows that produce it.

    Source: Li et al. 2017, section 3.1 (the norm of a filter). Columns and biases are left out: on DeiT-Tiny the norm
    of all of a hidden unit's weights is a far worse guide (docs/LOG.md).
    """
    rows = [group if group.kind == "weight" else _producers(model, group) for group in groups]
    squares = {name: parameter.detach().double().square() for name, parameter in parameters_of(model, rows).items()}
    return Importance({group.name: unit_sums(group, squares).sqrt() for group in rows})


def energy(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by its share of the energy of all weights of its layer that are at least as large.

    w_(j)^2 / sum_{k<=j} w_(k)^2 with |w_(1)| >= |w_(2)| >= ..., in float64; 0 for a weight that is 0.

    Source: DIMAP equation 10; LAMP (Lee et al. 2021) is the same score written from the other end.
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
        raise BadInput(f"{bare[0]}: a block is not worth the sum of its weights; use a criterion that runs the model")
    names = dict.fromkeys(part.param for group in groups for part in group.slices)
    return {name: model.get_parameter(name) for name in names}


def _producers(model: nn.Module, group: Group) -> Group:
    """The group with only the slices along the output of a weight matrix or convolution."""
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
    """Magnitudes from large to small, and where each was; of equal ones the first counts as the smallest, as in select.

    A magnitude's bits, read as a whole number, are in the order of the magnitudes, so those of float32 and the position
    make one number, and numpy sorts such numbers many times faster than torch sorts pairs.
    """
    if flat.dtype == torch.float64:
        order = flat.abs().argsort(stable=True).flip(0)
        return flat.abs()[order], order
    keys = flat.float().abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys += torch.arange(len(flat))
    keys.numpy().sort()
    keys = keys.flip(0)
    return (keys >> 32).int().view(torch.float32), keys.bitwise_and_(0xFFFFFFFF)
