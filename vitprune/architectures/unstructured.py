"""Single weights, of all layers or of a family whose prunable layers are a table, where each is pruned or kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitprune.architectures import parts
from vitprune.architectures.slices import PLAIN
from vitprune.errors import BadInput
from vitprune.groups import Group, ParamSlice, is_within

WITHIN = ("conv", "linear", "ln")  # of a layer with its norm
POOLS = {"q": "qkv", "k": "qkv", "v": "qkv", "kv": "qkv", "qk": "qkv", "fc1": "mlp", "fc2": "mlp"}


@dataclass(frozen=True)
class Table:
    """The layers of a family, by path with # in place of every number that is a part of the path.

    `prune` gives the pool of each layer whose weights may go, `keep` says of the others why theirs may not. A path
    matches as a whole: neither a norm beside a layer nor a longer name is ever meant. A path with its numbers in place
    goes before the one without.
    """

    prune: Mapping[str, str]
    keep: Mapping[str, str]


def weights(table: Table, model: nn.Module) -> list[Group]:
    """Every single weight of the table's layers, one group per layer in the model's order.

    Raises:
        BadInput: a layer of the model is not in the table or of an unexpected type.
    """
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


def all_weights(model: nn.Module) -> list[Group]:
    """Every single weight of every Linear and Conv2d layer but stem, classifier and depth-wise convolutions.

    Pools are named after layers: qkv, proj, mlp as in DIMAP, others by their own name.

    Raises:
        BadInput: a layer with a matrix of weights does not use them as they are, or there is no layer to prune.
    """
    found = []
    config: Any = getattr(model, "pretrained_cfg", {})
    kept = {_stem(path) for path in _paths(config.get("first_conv"))} | set(_paths(config.get("classifier")))
    for path, layer in _matrices(model):
        if not path or not isinstance(layer, nn.Linear | nn.Conv2d) or is_within(path, kept):
            continue
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
            continue
        if type(layer) not in PLAIN:
            raise parts.refuse(path, layer, "expected a Linear or Conv2d layer that uses its weights as they are")
        param = f"{path}.weight"
        found.append(Group(param, "weight", tuple(layer.weight.shape), (ParamSlice(param, None),), _pool(path)))
    if not found:
        raise BadInput(f"{type(model).__name__}: this model is not supported yet; no layer in it could lose weights")
    return found


def _paths(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _stem(path: str) -> str:
    """The stem around the first convolution: patch_embed of patch_embed.proj, patch_embeds.0 of patch_embeds.0.proj."""
    first, *others = path.split(".")
    return f"{first}.{others[0]}" if len(others) > 1 and others[0].isdecimal() else first


def _pool(path: str) -> str:
    """The last name in a path that is neither a number nor that of a layer within a layer."""
    names = [name for name in path.split(".") if not name.isdecimal()]
    name = next((name for name in reversed(names) if name not in WITHIN), names[-1])
    return POOLS.get(name, name)
