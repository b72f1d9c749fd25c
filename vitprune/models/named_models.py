"""Create models by a name with a prefix: timm:NAME, hf:DIRECTORY_OR_CONFIG, torchvision:NAME, module:FILE:CALLABLE."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitprune.errors import BadInput
from vitprune.models import other_libraries
from vitprune.models.io import create
from vitprune.runtime.messages import first_line

PREFIXES = ("timm", "hf", "torchvision", "module")


def is_other_library(name: str) -> bool:
    """Return whether a name has a prefix of another library than timm."""
    return name.partition(":")[0] in PREFIXES[1:] and ":" in name


def create_named(name: str) -> nn.Module:
    """Create a model with random weights by its name.

    Args:
        name: NAME or timm:NAME of timm; hf:PATH, the config.json of a transformers model or its directory;
            torchvision:NAME; module:PACKAGE.FILE:CALLABLE, a function or class of one's own, called without arguments.

    Returns:
        The model, in evaluation mode.

    Raises:
        BadInput: there is no such model, or it cannot be built.
    """
    prefix, _, rest = name.partition(":")
    if Path(name).is_dir() and not timm.is_model(name.partition(".")[0]):
        raise BadInput(
            f"{name}: is a directory; give the name of a model of timm, or hf:{name} for one of transformers"
        )
    if prefix not in PREFIXES[1:]:
        return create(rest if prefix == "timm" else name, key="model").eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = {"hf": _of_transformers, "torchvision": _of_torchvision, "module": _of_module}[prefix]
        try:
            model = build(rest)
        except BadInput:
            raise
        except Exception as error:  # code of others may raise anything
            raise BadInput(f"{name}: cannot be built ({first_line(error)})") from None
    if not isinstance(model, nn.Module):
        raise BadInput(f"{name}: returns a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def _of_transformers(place: str) -> Any:
    path = Path(place) / "config.json" if Path(place).is_dir() else Path(place)
    try:
        raw = json.loads(path.read_text())
        kind = raw["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = first_line(error)
        raise BadInput(f"hf:{place}: no config.json of transformers with its architecture ({why})") from None
    return other_libraries.build_transformers(path, str(kind), raw)


def _of_torchvision(name: str) -> Any:
    import torchvision

    return torchvision.models.get_model_builder(name)()


def _of_module(place: str) -> Any:
    module, _, function = place.rpartition(":")
    if not module or not function:
        raise BadInput(f"module:{place}: write module:PACKAGE.FILE:CALLABLE")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)()
