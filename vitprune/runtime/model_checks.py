"""Check that a model of a user can be scored, pruned and saved."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import drop_cached
from vitprune.runtime.wrappers import plain_model


def checked_model(model: Any) -> nn.Module:
    """Return the model inside its wrappers, after checks of its layers and weights.

    Raises:
        BadInput: a layer computes its weight from other parameters, the weights are not finite, of several types, on
            several devices or without values.
    """
    plain = plain_model(model)
    for path, module in plain.named_modules():
        _refuse_computed_weights(path, module)
    _check_weights(plain)
    drop_cached(plain)
    return plain


def float_type(model: nn.Module) -> torch.dtype:
    """Return the floating-point type of a model's weights and buffers.

    Raises:
        BadInput: there are several.
    """
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    types: list[torch.dtype] = sorted(dtypes, key=str)
    if len(types) != 1:
        name, listed = type(model).__name__, ", ".join(map(str, types))
        raise BadInput(f"{name}: weights are {listed}; give them one type" if types else f"{name}: has no weights")
    return types[0]


def _refuse_computed_weights(path: str, module: nn.Module) -> None:
    """Refuse layers whose weight is computed from other parameters, or whose forward pass was replaced."""
    forward = vars(module).get("forward")
    # a copy of the model would run the original's layers
    if forward is not None and getattr(forward, "__self__", None) is not module:
        where = path or type(module).__name__
        raise BadInput(f"{where}: its method forward was replaced by a function; give the model before that")
    if is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        raise BadInput(f"{path}.{name}: is parametrized; call {remedy} first")
    for hook in module._forward_pre_hooks.values():
        for kind, function in (
            (torch_prune.BasePruningMethod, "prune.remove"),
            (WeightNorm, "remove_weight_norm"),
            (SpectralNorm, "remove_spectral_norm"),
        ):
            if isinstance(hook, kind):
                name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
                remedy = f"torch.nn.utils.{function}(layer, {name!r})"
                raise BadInput(f"{path}.{name}: is computed by {type(hook).__name__}; call {remedy} first")
    for leaf in ("lora_A", "lora_B", "lora_down", "lora_up"):
        if leaf in module._modules or leaf in module._parameters:
            raise BadInput(f"{path}: has a low-rank update ({leaf}); merge it into the weight first")


def _check_weights(model: nn.Module) -> None:
    float_type(model)
    devices = defaultdict(list)
    for name, tensor in model.state_dict().items():
        devices[tensor.device].append(name)
        if tensor.is_meta:
            raise BadInput(f"{name}: is on the meta device and has no values; load weights into the model first")
        if type(tensor) is not torch.Tensor:
            raise BadInput(f"{name}: is a {type(tensor).__name__}; convert it to a plain tensor first")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInput(f"{name}: has values that are not finite; the training diverged, use an earlier checkpoint")
    if len(devices) > 1:
        listed = " and ".join(f"{names[0]} on {device}" for device, names in devices.items())
        raise BadInput(f"{type(model).__name__}: {listed}; move the model to one device")
