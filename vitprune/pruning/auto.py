"""Choose a pruning method by what is to be pruned; docs/guides/choose_a_method.md has the measured figures."""

from collections.abc import Collection

from torch import nn

from vitprune.architectures.chain_builders import build_chain
from vitprune.errors import BadInput
from vitprune.pruning.methods import METHODS

PREFERRED = ("unit-obs", "obc", "upvits", "upvits-fisher", "upvits-blocks")


def auto_method(kinds: Collection[str], whole_units: bool, rotated: bool = False, exact: bool = True) -> str:
    """Return the method that prunes these kinds with the least loss of accuracy without training.

    Args:
        kinds: The kinds to prune; empty if they are not given.
        whole_units: Without kinds: units, such as FFN units and attention channels, instead of single weights.
        rotated: Whether the residual stream is rotated first, which unit-obs needs for residual channels.
        exact: Whether the model has exact KL scores, see `has_exact_scores`, which upvits needs.

    Raises:
        BadInput: no method prunes all of these kinds.
    """
    wanted = set(kinds) if kinds or whole_units else {"weight"}
    for name in PREFERRED:
        usable = METHODS[name].scopes.keys() - (set() if rotated or name != "unit-obs" else {"residual"})
        if wanted <= usable and (exact or name != "upvits"):
            return name
    names = ", ".join(sorted(wanted))
    raise BadInput(f"method auto: no method prunes {names} together; prune them one after the other")


def has_exact_scores(model: nn.Module) -> bool:
    """Return whether exact KL scores can be computed of a model."""
    try:
        build_chain(model)
    except BadInput:
        return False
    return True
