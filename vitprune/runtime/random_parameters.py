"""Random parameters for proofs: no unit is without effect."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomize_parameters(model: nn.Module) -> nn.Module:
    """Draw all parameters and running statistics at random from a fixed seed, in float64, in place.

    timm initializes some to zero or one, which would hide the effect of a removed unit.

    Args:
        model: The model.

    Returns:
        The model, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(0)
    model.double()
    model.eval()  # LeViT's returns None
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        noise = random_numbers(parameter.shape, generator)
        scale = parameter.dim() < 2 and name.endswith("weight") and not isinstance(owner, nn.Linear | nn.Conv2d)
        fan_in = max(1, parameter.numel() // max(1, parameter.shape[0])) if parameter.dim() > 1 else 100
        parameter.copy_(noise / fan_in**0.5 + float(scale))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * random_numbers(buffer.shape, generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def random_numbers(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw numbers of mean 0 and variance 1 in float64; uniform, which is several times faster than normal."""
    limit = 3**0.5
    return torch.empty(tuple(shape), dtype=torch.float64).uniform_(-limit, limit, generator=generator)
