"""timm models in and out: create, load, save, rebuild; safetensors and config.json, never pickle."""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.families import rebuild, structure, uniform_args
from vitprune.files import replacing

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def create(
    name: str,
    args: Mapping[str, Any] | None = None,
    seed: int = 0,
    pretrained: bool = False,
    checkpoint: Path | None = None,
) -> nn.Module:
    """A timm model with seeded random, pretrained or checkpoint weights.

    Raises:
        BadInput: timm does not know the name or an argument, or the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **(args or {}))
        except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
            raise BadInput(f"model.name {name!r}: timm cannot create it ({str(error).splitlines()[0]})") from None
    _match_channels(model)
    if checkpoint is not None:
        _fill(model, read_weights(checkpoint), checkpoint)
    return model


def _match_channels(model: Any) -> None:
    """Let mean and std of the config fit a model with another number of channels, by their average."""
    for key in ("mean", "std"):
        values = model.pretrained_cfg.get(key)
        if values and len(values) != model.in_chans:
            model.pretrained_cfg[key] = (sum(values) / len(values),) * model.in_chans


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        BadInput: it is missing or not a safetensors file.
    """
    try:
        return dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the path of a safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a safetensors file ({error})") from None


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors under a temporary name, then rename it."""
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[name] = own.clone() if own.data_ptr() in places else own  # of a module that has two names
        places.add(own.data_ptr())
    with replacing(path) as partial:
        try:
            safetensors.torch.save_file(plain, partial, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors and config.json: timm's layout plus the structure that rebuilds a shrunk model.

    A model whose blocks are all alike also loads in plain timm, as timm.create_model("local-dir:DIRECTORY").

    Raises:
        BadInput: the model was not made by timm.create_model.
    """
    directory = Path(directory)
    if "architecture" not in getattr(model, "pretrained_cfg", {}):
        raise BadInput(f"{type(model).__name__}: only models made by timm.create_model (or vitprune.load) can be saved")
    with replacing(directory / CONFIG) as partial:
        save_config_for_hf(model, str(partial), model_args=uniform_args(model))
        config = json.loads(partial.read_text())
        config["vitprune"] = {"format": 1, "structure": {name: list(shape) for name, shape in structure(model).items()}}
        partial.write_text(json.dumps(config, indent=2) + "\n")
        write_weights(model.state_dict(), directory / WEIGHTS)


def load(directory: str | Path) -> nn.Module:
    """Rebuild a model from a directory that `save` (or timm) wrote, running no code but timm's and ours.

    Raises:
        BadInput: a file is missing or broken, or weights and structure do not fit each other.
    """
    directory = Path(directory)
    config = _config(directory / CONFIG)
    model = create(config["architecture"], {"pretrained_cfg": config["pretrained_cfg"], **config["model_args"]})
    rebuild(model, config["vitprune"].get("structure", {}))
    tensors = read_weights(directory / WEIGHTS)
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(types) == 1:
        model.to(types.pop())
    _fill(model, tensors, directory / WEIGHTS)
    return model.eval()


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give a directory written by vitprune.save") from None
    except ValueError as error:  # not JSON, or not even text
        raise BadInput(f"{path}: not a timm model config ({error})") from None
    types = {"architecture": str, "pretrained_cfg": dict, "model_args": dict, "vitprune": dict}
    given: dict[str, Any] = ({"model_args": {}, "vitprune": {}} | config) if isinstance(config, dict) else {}
    wrong = [key for key, kind in types.items() if not isinstance(given.get(key), kind)]
    if wrong:
        raise BadInput(f"{path}: not a timm model config ({wrong[0]} is missing or of a wrong type)")
    shapes = given["vitprune"].get("structure", {})
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(type(size) is int for size in shape) for shape in shapes.values()
    ):
        raise BadInput(f"{path}: vitprune.structure must map names of groups to lists of whole numbers")
    return given


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load weights strictly, naming the first one that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise BadInput(f"{path}: weight {name} is missing; is this checkpoint of another model?")
        if name not in own:
            raise BadInput(
                f"{path}: weight {name} is not in {type(model).__name__}; is this checkpoint of another model?"
            )
        if own[name].shape != tensors[name].shape:
            raise BadInput(
                f"{path}: weight {name} has shape {list(tensors[name].shape)}, the model needs {list(own[name].shape)}"
            )
    model.load_state_dict(dict(tensors), strict=True)
