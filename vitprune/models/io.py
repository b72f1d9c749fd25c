"""timm models in and out: create, load, save, rebuild; safetensors and config.json, nothing that runs."""

import errno
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitprune.architectures import Cut, apply_cuts, resize_to_structure, structure, uniform_args
from vitprune.data.augment import data_config
from vitprune.errors import BadInput
from vitprune.models.validation import (
    FLOATS,
    FORMAT,
    ModelConfig,
    TensorSpec,
    check_finite,
    check_fit,
    read_config,
    read_header,
)
from vitprune.runtime.files import atomic_write

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_DENSE, SMALL = 64, 1 << 27  # a dense model is at most so many times what is left of it, if it is not small
MOST_OPERATIONS = 20_000  # of tensors, to build one; the largest of timm take 5,000


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
        _fill(model, checkpoint)
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
    with atomic_write(path) as partial:
        try:
            safetensors.torch.save_file(plain, partial, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors and config.json: timm's layout plus the structure that rebuilds a shrunk model.

    A model whose blocks are all alike also loads in plain timm, as timm.create_model("local-dir:DIRECTORY").

    Raises:
        BadInput: the model was not made by timm.create_model, or its weights are of several floating-point types.
    """
    directory = Path(directory)
    if "architecture" not in getattr(model, "pretrained_cfg", {}):
        raise BadInput(f"{type(model).__name__}: only models made by timm.create_model (or vitprune.load) can be saved")
    types = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(types) > 1:
        raise BadInput(f"{type(model).__name__}: weights are {', '.join(sorted(map(str, types)))}; give them one type")
    with atomic_write(directory / CONFIG) as partial:
        save_config_for_hf(model, str(partial), model_args=uniform_args(model))
        config = json.loads(partial.read_text())
        config["pretrained_cfg"]["crop_pct"] = data_config(model)["crop_pct"]  # timm writes that of the published size
        config["vitprune"] = {
            "format": FORMAT,
            "structure": {name: list(shape) for name, shape in structure(model).items()},
        }
        partial.write_text(json.dumps(config, indent=2) + "\n")
        write_weights(model.state_dict(), directory / WEIGHTS)


def load(directory: str | Path) -> nn.Module:
    """Rebuild a model from a directory that `save` (or timm) wrote, running no code but timm's and ours.

    The files are somebody else's: everything is checked on a model without memory before one is made.

    Raises:
        BadInput: a file is missing or broken, asks for more than a model needs, or weights, arguments and structure do
            not fit each other.
    """
    directory = Path(directory)
    config, path = read_config(directory / CONFIG), directory / WEIGHTS
    header = read_header(path)
    with torch.device("meta"):
        frame = _dense(config, header)
    cuts = _cut(frame, config)
    check_fit(path, header, frame.state_dict(), type(frame).__name__)
    model = _dense(config, header)
    apply_cuts(model, cuts)
    types = {FLOATS[entry.dtype] for entry in header.values() if entry.dtype in FLOATS}
    if types:
        model.to(types.pop())
    _fill(model, path)
    return model.eval()


@dataclass(frozen=True)
class SavedModel:
    """What a saved model is: `plain` says that timm alone rebuilds it from its arguments, all blocks being alike."""

    architecture: str
    pretrained_cfg: Mapping[str, Any]
    params: int
    plain: bool


def describe_saved(directory: Path) -> SavedModel:
    """What the files of a saved model say about it; no weight is read.

    Raises:
        BadInput: as of `load`.
    """
    config, path = read_config(directory / CONFIG), directory / WEIGHTS
    header = read_header(path)
    with torch.device("meta"):
        frame = _dense(config, header)
    plain = not config.structure or structure(frame) == config.structure
    _cut(frame, config)
    check_fit(path, header, frame.state_dict(), type(frame).__name__)
    return SavedModel(config.architecture, config.pretrained_cfg, sum(p.numel() for p in frame.parameters()), plain)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops what makes tensors without end: a depth in a config is a loop in timm."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._done = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._done += 1
        if self._done > MOST_OPERATIONS:
            raise RuntimeError(f"more than {MOST_OPERATIONS} operations, which no model needs")
        if args and isinstance(args[0], Tensor) and args[0].is_meta and function._schema.name.endswith("_"):
            return args[0]  # nothing is there to be changed in place
        return function(*args, **(kwargs or {}))


def _dense(config: ModelConfig, header: Mapping[str, TensorSpec]) -> nn.Module:
    """The model that a config's arguments describe, if it is no larger than its weights let expect."""
    args = {"pretrained_cfg": dict(config.pretrained_cfg), **config.args}
    given = sum(math.prod(entry.shape) for entry in header.values())
    try:
        with torch.random.fork_rng(devices=[]), _Operations():
            model: nn.Module = timm.create_model(config.architecture, pretrained=False, **args)
            _match_channels(model)
    except Exception as error:  # timm's code, at somebody else's arguments
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"{config.path}: timm cannot create {config.architecture} of these model_args ({told})"
        ) from None
    numbers = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    if numbers > max(SMALL, LARGEST_DENSE * given):
        raise BadInput(
            f"{config.path}: model_args describe a model of {numbers} weights, the file has {given}; correct them"
        )
    return model


def _cut(model: nn.Module, config: ModelConfig) -> list[Cut]:
    try:
        return resize_to_structure(model, config.structure)
    except BadInput as error:
        raise BadInput(f"{config.path}: vitprune.structure: {error}") from None


def _fill(model: nn.Module, path: Path) -> None:
    """Load a file's weights strictly, naming the first one that does not fit."""
    check_fit(path, read_header(path), model.state_dict(), type(model).__name__)
    tensors = read_weights(path)
    check_finite(path, tensors)
    model.load_state_dict(tensors, strict=True)
