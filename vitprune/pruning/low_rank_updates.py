"""Linear layers whose output channels are not pruned because a low-rank update (LoRA) is added to them."""

import itertools

from torch import nn

from vitprune.architectures import find_groups
from vitprune.errors import BadInput
from vitprune.groups import Group

KINDS = ("ffn", "attention", "head")


def low_rank_updates(model: nn.Module) -> dict[str, str]:
    """Return the modules B(A(x)) + W x with a frozen W that belongs to no group of KINDS, each with the reason.

    Args:
        model: Any model.
    """
    updated = {path: names for path, module in model.named_modules() if (names := _low_rank_update(module))}
    if not updated:
        return {}
    pruned = {part.param for kind in KINDS for group in _groups(model, kind) for part in group.slices}
    return {
        path: f"{path}: has a low-rank update ({names[1]}, {names[2]}) of {names[0]}; merge it into the weight first"
        for path, names in updated.items()
        if f"{path}.{names[0]}.weight" not in pruned
    }


def _groups(model: nn.Module, kind: str) -> list[Group]:
    try:
        return find_groups(model, [kind])
    except BadInput:  # the model has none
        return []


def _low_rank_update(module: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of the frozen layer W and of the trainable layers A and B of a module, or None."""
    layers = [(name, layer) for name, layer in module.named_children() if isinstance(layer, nn.Linear)]
    frozen = [pair for pair in layers if not pair[1].weight.requires_grad]
    trained = [pair for pair in layers if pair[1].weight.requires_grad]
    for (base, w), ((first, a), (second, b)) in itertools.product(frozen, itertools.permutations(trained, 2)):
        sizes = (a.in_features, a.out_features, b.out_features) == (w.in_features, b.in_features, w.out_features)
        if sizes and b.in_features < min(w.in_features, w.out_features):
            return base, first, second
    return None
