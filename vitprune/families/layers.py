"""Single weights of a family whose prunable layers are a table, in which every layer is either pruned or kept."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import Conv2dSame
from torch import nn

from vitprune.errors import BadInput
from vitprune.families import parts
from vitprune.groups import Group, ParamSlice

PLAIN = (
    nn.Linear,
    nn.Conv2d,
    Conv2dSame,
)  # compute with the weights as they are; a StdConv2d moves zeros away from zero


@dataclass(frozen=True)
class Table:
    """The layers of a family, by path with # in place of every number that is a part of the path.

    `prune` gives the pool of each layer whose weights may go, `keep` says of the others why theirs may not. A path
    matches as a whole: neither a norm beside a layer nor a longer name is ever meant. A path with its numbers in place
    goes before the one without.
    """

    prune: Mapping[str, str]
    keep: Mapping[str, str]


def weights(table: Table, model: Any, kind: str) -> list[Group]:
    """Every single weight of the table's layers, one group per layer in the model's order.

    Raises:
        BadInput: the kind is not `weight`, or a layer of the model is not in the table or of an unexpected type.
    """
    if kind != "weight":
        raise BadInput(f"{type(model).__name__}: groups of kind {kind!r} are not understood yet; weight is")
    found = []
    for path, layer in _matrices(model):
        name = _known(table, path)
        if name is None:
            raise parts.refuse(path, layer, "not in the table of prunable layers")
        if name in table.keep:
            continue
        if type(layer) not in PLAIN:
            raise parts.refuse(path, layer, "expected a Linear or Conv2d layer that uses its weights as they are")
        param = f"{path}.weight"
        found.append(Group(param, "weight", tuple(layer.weight.shape), (ParamSlice(param, None),), table.prune[name]))
    return found


def _known(table: Table, path: str) -> str | None:
    """The name of a layer in the table: its path, or with # for every number, as in stages.#.blocks.#.mlp.fc1."""
    general = ".".join("#" if part.isdecimal() else part for part in path.split("."))
    return next((name for name in (path, general) if name in table.keep or name in table.prune), None)


def _matrices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules with a weight of two axes or more; norms, scales and position tables have none."""
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and parameter.dim() > 1:
            yield path, model.get_submodule(path)
