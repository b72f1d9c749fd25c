"""Context managers: evaluation mode, parameters without gradients, and a state that gradients can be computed in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode; restore the mode of every module at the end."""
    with kept_mode(model):
        model.eval()
        yield


@contextmanager
def kept_mode(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module at the end; tensors that modules cache in evaluation mode are dropped."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train()  # drops them
        for module, training in modes:
            module.training = training


def drop_cached(model: nn.Module) -> None:
    """Drop tensors that modules cache in evaluation mode, such as LeViT's biases: they cannot be copied or resized."""
    with kept_mode(model):
        pass


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of all parameters; enable them again at the end where they were enabled."""
    parameters = [parameter for parameter in model.parameters() if not parameter.is_inference()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Leave inference mode, autocast and activation checkpointing, in which gradients of layers are wrong or missing.

    The caller's modes and the checkpointing of the model are restored at the end.
    """
    device = next(model.parameters()).device.type
    with (
        _disabled(model, "grad_checkpointing"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield


def unfused_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Disable fused attention of a model."""
    return _disabled(model, "fused_attn")


@contextmanager
def _disabled(model: nn.Module, flag: str) -> Iterator[None]:
    """Set an attribute of modules from True to False; set it back at the end."""
    enabled = [module for module in model.modules() if vars(module).get(flag) is True]
    for module in enabled:
        setattr(module, flag, False)
    try:
        yield
    finally:
        for module in enabled:
            setattr(module, flag, True)
