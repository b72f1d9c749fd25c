"""Stochastic depth (drop path) during training: random skipping of residual branches."""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers import DropPath
from torch import nn

from vitprune.errors import BadInput

BRANCHES = ("drop_path1", "drop_path2")


@contextmanager
def stochastic_depth(model: nn.Module, rate: float) -> Iterator[None]:
    """Set the drop-path rate of block i of n to rate * i / (n - 1), and restore the model's own rates at the end.

    Args:
        model: A timm model.
        rate: Rate of the last block; 0 keeps the model's own rates.

    Raises:
        BadInput: the model has no drop-path modules.

    Source: Huang et al. 2016, section 3; DeiT's recipe.
    """
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in BRANCHES] if rate else []
    if rate and not paths:
        raise BadInput(f"train.drop_path {rate}: {type(model).__name__} has no drop-path modules; set it to 0")
    blocks = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    originals = {path: model.get_submodule(path) for path in paths}
    try:
        for path in paths:
            index = blocks.index(path.rpartition(".")[0])
            model.set_submodule(path, DropPath(rate * index / max(1, len(blocks) - 1)))
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
