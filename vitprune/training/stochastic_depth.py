"""Stochastic depth for a time: residual branches of a timm model that are left out at random in training."""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers import DropPath
from torch import nn

from vitprune.errors import BadInput

BRANCHES = ("drop_path1", "drop_path2")


@contextmanager
def stochastic_depth(model: nn.Module, rate: float) -> Iterator[None]:
    """Drop the branches of block i of n at a rate of rate * i / (n - 1) while training; 0 leaves the model's own rates.

    Raises:
        BadInput: the model has no blocks with branches to drop.

    Source: Huang et al. 2016, section 3; DeiT's recipe.
    """
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in BRANCHES] if rate else []
    if rate and not paths:
        raise BadInput(f"train.drop_path {rate}: {type(model).__name__} has no branches to drop; set it to 0")
    blocks = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    before = {path: model.get_submodule(path) for path in paths}
    try:
        for path in paths:
            place = blocks.index(path.rpartition(".")[0])
            model.set_submodule(path, DropPath(rate * place / max(1, len(blocks) - 1)))
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)
