"""Wrappers of a model: torch.compile, data parallelism, averaged weights, timm's feature extraction."""

from collections.abc import Mapping
from typing import Any

from timm.models._features import FeatureGetterNet
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vitprune.errors import BadInput

WITH_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)


def plain_model(model: Any) -> nn.Module:
    """Return the model inside wrappers that do not change its output; a model without a wrapper is returned itself.

    Raises:
        BadInput: it is not a module of torch, or a script of TorchScript.
    """
    inner = _inner(model)
    if inner is not None:
        return plain_model(inner)
    if not isinstance(model, nn.Module) or type(model).__module__.startswith("torch.jit"):
        raise BadInput(f"model: is a {type(model).__name__}; give a model of timm.create_model or vitprune.load")
    return model


def is_timm_model(model: nn.Module) -> bool:
    """Return whether a model has timm's config of a model, as those of timm.create_model and `vitprune.load` have."""
    return "pretrained_cfg" in vars(model)


def layers_of_config(model: nn.Module, key: str) -> tuple[str, ...]:
    """Return the paths of the layers that timm's config of a model names; none if there is no such config.

    Args:
        model: Any model.
        key: first_conv or classifier.
    """
    config = getattr(model, "pretrained_cfg", None)
    names = config.get(key) if isinstance(config, Mapping) else None
    listed = names if isinstance(names, list | tuple) else [names]
    return tuple(name for name in listed if isinstance(name, str))


def _inner(model: Any) -> Any:
    if isinstance(model, WITH_MODULE):
        return model.module
    if isinstance(model, ModelEma):
        return model.ema
    if type(model).__module__.startswith("torch._dynamo"):  # its import would take a second
        return model._orig_mod
    if type(model) is nn.Sequential and len(model) == 1:
        return model[0]
    return model.model if isinstance(model, FeatureGetterNet) else None
