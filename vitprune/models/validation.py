"""The two files of a saved model, read as data: bounded in size, checked before anything is built, nothing fetched."""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitprune.errors import BadInput

FORMAT = 1
MAX_CONFIG_BYTES = 4 << 20  # bytes: with the names of 21,841 classes about 2 MiB
MAX_NUMBER = 1 << 20  # of an argument or a size; timm's own are far below
MAX_LENGTH, MAX_DEPTH = 10_000, 4  # of lists and mappings
GROUP = re.compile(r"\w+(\.\w+)*", re.ASCII)
NAME = re.compile(r"[\w-]*", re.ASCII)  # no path, no address, no module
ARCHITECTURE = re.compile(r"\w+(\.[\w-]+)?", re.ASCII)

# by these keys timm reads or fetches, and wraps or converts what it has made; none is an argument of a model
READS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn")
FETCHES = ("pretrained_custom_load", "pretrained_model_args", "checkpoint_path", "cache_dir", "pruned")
WRAPS = ("model_cfg", "feature_cfg", "feature_cls", "features_only", "kwargs_filter", "out_indices", "device", "dtype")
CONVERTS = ("scriptable", "exportable", "no_jit")
SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict")  # of weights, in a pretrained_cfg
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | OTHERS | {"BOOL": torch.bool}


@dataclass(frozen=True)
class ModelConfig:
    """A config.json whose every value has the type and size that a model needs; its names are names and no paths."""

    path: Path
    architecture: str
    args: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any]
    structure: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def read_config(path: Path) -> ModelConfig:
    """Read the config.json of a directory that `vitprune.save` or timm wrote.

    Raises:
        BadInput: it is missing, is not one, or has a value that is no argument of a timm model.
    """
    raw = _object(path)
    for key, kind in {"architecture": str, "pretrained_cfg": dict, "model_args": dict, "vitprune": dict}.items():
        if not isinstance(raw.get(key), kind):
            raise BadInput(f"{path}: not a timm model config ({key} is missing or of a wrong type)")
    architecture, structure = raw["architecture"], raw["vitprune"].get("structure", {})
    if not ARCHITECTURE.fullmatch(architecture) or not timm.is_model(architecture):
        raise BadInput(f"{path}: architecture {architecture[:80]!r}: timm {timm.__version__} has no model of this name")
    if raw["vitprune"].get("format", FORMAT) != FORMAT:
        raise BadInput(
            f"{path}: vitprune.format is not {FORMAT}, which is all that this version reads; update vitprune"
        )
    for key, value in raw["model_args"].items():
        if key in READS + FETCHES + WRAPS + CONVERTS:
            raise BadInput(f"{path}: model_args.{key}: not an argument of a model but of timm's factory; remove it")
        _check(path, f"model_args.{key[:80]}", value)
    _check_preprocessing(path, raw["pretrained_cfg"])
    return ModelConfig(path, architecture, raw["model_args"], raw["pretrained_cfg"], _structure(path, structure))


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, types and shapes of the tensors in a safetensors file, none of which is read.

    Raises:
        BadInput: it is missing or not a safetensors file.
    """
    _size(path)
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            return {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a safetensors file ({_line(error)}); fetch or save it again") from None


def check_fit(path: Path, header: Mapping[str, TensorSpec], own: Mapping[str, Tensor], model: str) -> None:
    """Check that a file has all tensors of a model and no others, of their shapes and of one floating-point type.

    Raises:
        BadInput: a weight does not fit; it is named.
    """
    first: tuple[str, str] | None = None
    for name in sorted(own.keys() | header.keys()):
        if name not in header:
            raise BadInput(f"{path}: weight {name} is missing; is this checkpoint of another model?")
        entry = header[name]
        if name not in own:
            raise BadInput(f"{path}: weight {_named(name)} is not in {model}; is this checkpoint of another model?")
        if own[name].shape != entry.shape:
            raise BadInput(
                f"{path}: weight {name} has shape {list(entry.shape)}, the model needs {list(own[name].shape)}"
            )
        floating = own[name].is_floating_point()
        if entry.dtype not in FLOATS if floating else DTYPES.get(entry.dtype) != own[name].dtype:
            wanted = ", ".join(FLOATS) if floating else str(own[name].dtype)
            raise BadInput(f"{path}: weight {name} has type {entry.dtype}, the model needs {wanted}; save it again so")
        if floating:
            first = first or (name, entry.dtype)
            if entry.dtype != first[1]:
                raise BadInput(
                    f"{path}: weight {name} has type {entry.dtype}, {first[0]} has {first[1]}; save both in one type"
                )


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that no weight is infinite or not a number.

    Raises:
        BadInput: one is; its tensor is named.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInput(
                f"{path}: weight {name} has values that are not finite; its training has failed, do not use it"
            )


def _object(path: Path) -> dict[str, Any]:
    size = _size(path)
    if size > MAX_CONFIG_BYTES:
        raise BadInput(f"{path}: not a timm model config ({size} bytes, at most {MAX_CONFIG_BYTES} are read)")
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not even text, or nested without end
        raise BadInput(f"{path}: not a timm model config ({_line(error)}); fetch or save it again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    return {"model_args": {}, "vitprune": {}} | raw if isinstance(raw, dict) else {}


def _size(path: Path) -> int:
    """Bytes of a regular file; links to one are followed, as the caches of DVC and of the hub are made of them."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give a directory written by vitprune.save") from None
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}); give a directory written by vitprune.save"
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        raise BadInput(f"{path}: not a regular file; give a directory written by vitprune.save")
    return facts.st_size


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _check(path: Path, key: str, value: Any, depth: int = 0) -> None:
    """Refuse what no model takes: paths, addresses, module names, numbers without bound, deep nesting."""
    if isinstance(value, str) and (len(value) > 64 or not NAME.fullmatch(value)):
        raise BadInput(f"{path}: {key} is {value[:80]!r}; an argument of a model is a plain name; remove it")
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        raise BadInput(f"{path}: {key} is beyond {MAX_NUMBER}, which no model needs; correct it")
    if isinstance(value, list | dict):
        if depth == MAX_DEPTH or len(value) > MAX_LENGTH:
            raise BadInput(f"{path}: {key} is longer or deeper nested than any model needs; correct it")
        pairs = value.items() if isinstance(value, dict) else ((str(place), item) for place, item in enumerate(value))
        for name, item in pairs:
            _check(path, f"a key in {key}", name, depth + 1)
            _check(path, f"{key}.{name[:80]}", item, depth + 1)


def _check_preprocessing(path: Path, found: Mapping[str, Any]) -> None:
    for key in SOURCES:
        if found.get(key) is not None:
            raise BadInput(f"{path}: pretrained_cfg.{key}: names a source to fetch or read weights from; remove it")
    for key in ("mean", "std"):
        values = found.get(key) or []
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            raise BadInput(f"{path}: pretrained_cfg.{key} must be a list of numbers; correct it")
    for key in ("input_size", "test_input_size", "min_input_size", "pool_size"):
        sizes = found.get(key) or []
        if not isinstance(sizes, list) or not all(type(size) is int and 0 < size <= 1 << 14 for size in sizes):
            raise BadInput(f"{path}: pretrained_cfg.{key} must be a list of sizes from 1 to {1 << 14}; correct it")


def _structure(path: Path, found: object) -> dict[str, tuple[int, ...]]:
    where = f"{path}: vitprune.structure"
    if not isinstance(found, dict) or len(found) > MAX_LENGTH:
        raise BadInput(f"{where} must map names of groups to lists of whole numbers; fetch or save it again")
    for name, shape in found.items():
        if not GROUP.fullmatch(name):
            raise BadInput(f"{where}: {_named(name)} is not the name of a group; fetch or save it again")
        if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= MAX_NUMBER for size in shape):
            raise BadInput(f"{where}.{name[:80]} must be a list of whole numbers from 1 to {MAX_NUMBER}; correct it")
    return {name: tuple(shape) for name, shape in found.items()}


def _named(name: str) -> str:
    """A name of somebody else's, fit for one line of a message."""
    return name if len(name) <= 80 and GROUP.fullmatch(name) else repr(name[:80])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
