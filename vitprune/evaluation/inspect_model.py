"""Parameters and MACs of all groups of a model, with totals per kind: the table of `vitprune inspect`."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from vitprune.architectures import find_groups
from vitprune.config.prune_config import KINDS
from vitprune.errors import BadInput
from vitprune.evaluation.cost import group_costs


class GroupRow(NamedTuple):
    """A group, the total of a kind (without a name), or a kind that the model does not have (`why` says the reason)."""

    name: str
    kind: str
    units: str = ""
    params: int = 0
    macs: int = 0
    why: str = ""


def inspect_groups(model: nn.Module, example: Tensor) -> Iterator[GroupRow]:
    """Yield a row for every group, and after the groups of a kind their total.

    Args:
        model: The model.
        example: One image, (1, C, H, W).

    Raises:
        BadInput: the model has no groups of any kind.
    """
    refused = []
    for kind in KINDS:
        try:
            groups = find_groups(model, [kind])
        except BadInput as error:
            refused.append(error)
            yield GroupRow("", kind, why=str(error))
            continue
        cost = group_costs(model, groups, example)
        for group in groups:
            yield GroupRow(group.name, kind, " x ".join(map(str, group.shape)), *cost[group.name])
        params, macs = (sum(cost[group.name][number] for group in groups) for number in (0, 1))
        yield GroupRow("", kind, f"{sum(group.units for group in groups):,}", params, macs)
    if len(refused) == len(KINDS):
        raise refused[0]
