"""Validation of untrusted checkpoints: config.json and the safetensors header are checked before a model is built."""

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
from torch import Tensor, nn

from vitprune.errors import BadInput

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_DENSE_RATIO, SMALL = 64, 1 << 27  # a dense model has at most 64 times the weights of the file, or 2**27
FORMAT = 1
MAX_CONFIG_BYTES = 4 << 20  # 21,841 class names take about 2 MiB
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of timm
MAX_NUMBER = 1 << 20  # of an argument or a size; far above those of timm
MAX_LENGTH, MAX_DEPTH = 10_000, 4  # of lists and mappings
GROUP = re.compile(r"\w+(\.\w+)*", re.ASCII)
NAME = re.compile(r"[\w-]*", re.ASCII)  # no path, URL or module name
ARCHITECTURE = re.compile(r"\w+(\.[\w-]+)?", re.ASCII)

# arguments of timm.create_model that are not the model's: they load, download, wrap or convert
FACTORY_ARGS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "pretrained_custom_load", "pretrained_model_args", "checkpoint_path", "cache_dir", "pruned",
    "model_cfg", "feature_cfg", "feature_cls", "features_only", "kwargs_filter", "out_indices", "device", "dtype",
    "scriptable", "exportable", "no_jit",
)  # fmt: skip
# keys of pretrained_cfg that name a source of weights
SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | OTHERS | {"BOOL": torch.bool}


@dataclass(frozen=True)
class ModelConfig:
    """A validated config.json: value types, sizes and names are checked."""

    path: Path
    architecture: str
    args: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any]
    structure: Mapping[str, tuple[int, ...]]
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def read_config(path: Path) -> ModelConfig:
    """Read and validate the config.json of a saved model.

    Raises:
        BadInput: the file is missing, is not a model config, or has a value that a timm model does not accept.
    """
    raw = read_object(path)
    for key, kind in {"architecture": str, "pretrained_cfg": dict, "model_args": dict, "vitprune": dict}.items():
        if not isinstance(raw.get(key), kind):
            raise BadInput(f"{path}: not a timm model config ({key} is missing or of a wrong type)")
    architecture, structure = raw["architecture"], raw["vitprune"].get("structure", {})
    if not ARCHITECTURE.fullmatch(architecture) or not timm.is_model(architecture):
        raise BadInput(f"{path}: architecture {architecture[:80]!r}: timm {timm.__version__} has no model of this name")
    check_format(path, raw["vitprune"].get("format", FORMAT))
    for key, value in raw["model_args"].items():
        if key in FACTORY_ARGS:
            raise BadInput(f"{path}: model_args.{key}: an argument of timm.create_model, not of the model; remove it")
        check_value(path, f"model_args.{key[:80]}", value)
    _check_preprocessing(path, raw["pretrained_cfg"])
    classes = checked_classes(path, raw["vitprune"].get("classes"))
    shapes = checked_structure(path, structure)
    return ModelConfig(path, architecture, raw["model_args"], raw["pretrained_cfg"], shapes, classes)


def check_format(path: Path, number: object) -> None:
    """Check the format of the entry `vitprune` of a config.json.

    Raises:
        BadInput: this version does not read it.
    """
    if number != FORMAT:
        raise BadInput(
            f"{path}: vitprune.format is not {FORMAT}, the only one that this version reads; update vitprune"
        )


def check_size(path: Path, model: nn.Module, header: Mapping[str, TensorSpec]) -> None:
    """Check that a dense model is not much larger than the weights of its pruned form.

    Args:
        path: The config.json, for messages.
        model: The dense model.
        header: Tensors of the file of weights.

    Raises:
        BadInput: it is.
    """
    stored = sum(math.prod(entry.shape) for entry in header.values())
    numbers = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    if numbers > max(SMALL, MAX_DENSE_RATIO * stored):
        raise BadInput(
            f"{path}: its arguments describe a model of {numbers} weights, the file has {stored}; correct them"
        )


def header_of(model: nn.Module) -> dict[str, TensorSpec]:
    """Return the header of the safetensors file that would have the weights of a model."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: TensorSpec(codes.get(tensor.dtype, ""), tuple(tensor.shape)) for name, tensor in state.items()}


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Read names, types and shapes of the tensors in a safetensors file, without their values.

    Raises:
        BadInput: the file is missing or not a safetensors file.
    """
    _size(path)
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            return {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a safetensors file ({_line(error)}); download or save it again") from None


def check_fit(path: Path, header: Mapping[str, TensorSpec], expected: Mapping[str, Tensor], model: str) -> None:
    """Check that a file has exactly the tensors of a model, in its shapes and one floating-point type.

    Args:
        path: The file, for messages.
        header: Tensors of the file.
        expected: Tensors of the model, possibly on the meta device.
        model: Name of the model class, for messages.

    Raises:
        BadInput: a weight is missing, unknown, or has another shape or type.
    """
    first_float: tuple[str, str] | None = None
    for name in sorted(expected.keys() | header.keys()):
        if name not in header:
            raise BadInput(f"{path}: weight {name} is missing; is the checkpoint of another model?")
        entry = header[name]
        if name not in expected:
            raise BadInput(f"{path}: weight {_quoted(name)} is not in {model}; is the checkpoint of another model?")
        if expected[name].shape != entry.shape:
            raise BadInput(
                f"{path}: weight {name} has shape {list(entry.shape)}, the model needs {list(expected[name].shape)}"
            )
        floating = expected[name].is_floating_point()
        if entry.dtype not in FLOATS if floating else DTYPES.get(entry.dtype) != expected[name].dtype:
            wanted = ", ".join(FLOATS) if floating else str(expected[name].dtype)
            raise BadInput(
                f"{path}: weight {name} has type {entry.dtype}, the model needs {wanted}; save it in that type"
            )
        if floating:
            first_float = first_float or (name, entry.dtype)
            if entry.dtype != first_float[1]:
                raise BadInput(
                    f"{path}: weight {name} has type {entry.dtype}, {first_float[0]} has {first_float[1]}; use one type"
                )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of limited size.

    Raises:
        BadInput: it is missing, too large, or not JSON.
    """
    size = _size(path)
    if size > MAX_CONFIG_BYTES:
        raise BadInput(f"{path}: not a timm model config ({size} bytes, the limit is {MAX_CONFIG_BYTES})")
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
        raise BadInput(f"{path}: not a timm model config ({_line(error)}); download or save it again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    return {"model_args": {}, "vitprune": {}} | raw if isinstance(raw, dict) else {}


def _size(path: Path) -> int:
    """Return the size of a regular file in bytes; links, as in the caches of DVC and of the hub, are followed."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give a directory written by vitprune.save") from None
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}); give a directory written by vitprune.save"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path}: not a regular file; give a directory written by vitprune.save")
    return status.st_size


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def check_value(path: Path, key: str, value: Any, depth: int = 0) -> None:
    """Reject values that no model accepts: paths, URLs, module names, huge numbers, deep nesting.

    Args:
        path: The file, for messages.
        key: Name of the value, for messages.
        value: The value.
        depth: Depth of nesting.

    Raises:
        BadInput: such a value.
    """
    if isinstance(value, str) and (len(value) > 64 or not NAME.fullmatch(value)):
        raise BadInput(f"{path}: {key} is {value[:80]!r}; a text argument must be a plain name; remove it")
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        raise BadInput(f"{path}: {key} is larger than {MAX_NUMBER}; correct it")
    if isinstance(value, list | dict):
        if depth == MAX_DEPTH or len(value) > MAX_LENGTH:
            raise BadInput(f"{path}: {key} is too long or nested too deeply; correct it")
        pairs = value.items() if isinstance(value, dict) else ((str(index), item) for index, item in enumerate(value))
        for name, item in pairs:
            check_value(path, f"a key in {key}", name, depth + 1)
            check_value(path, f"{key}.{name[:80]}", item, depth + 1)


def _check_preprocessing(path: Path, preprocessing: Mapping[str, Any]) -> None:
    for key in SOURCES:
        if preprocessing.get(key) is not None:
            raise BadInput(f"{path}: pretrained_cfg.{key}: a source of weights; remove it")
    for key in ("first_conv", "classifier"):
        layers = preprocessing.get(key)
        names = layers if isinstance(layers, list) else [layers]
        if layers is not None and not all(isinstance(name, str) for name in names):
            raise BadInput(f"{path}: pretrained_cfg.{key} must be the path of a layer or a list of paths; correct it")
    for key in ("mean", "std"):
        values = preprocessing.get(key) or []
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            raise BadInput(f"{path}: pretrained_cfg.{key} must be a list of numbers; correct it")
    if any(value == 0 for value in preprocessing.get("std") or []):
        raise BadInput(f"{path}: pretrained_cfg.std must not be 0; correct it")
    crop = preprocessing.get("crop_pct")
    if crop is not None and (type(crop) not in (int, float) or not 0.05 <= crop <= 2):
        raise BadInput(f"{path}: pretrained_cfg.crop_pct must be a number from 0.05 to 2; correct it")
    interpolation = preprocessing.get("interpolation")
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise BadInput(f"{path}: pretrained_cfg.interpolation must be one of {', '.join(INTERPOLATIONS)}; correct it")
    for key in ("input_size", "test_input_size", "min_input_size", "pool_size"):
        sizes = preprocessing.get(key) or []
        if not isinstance(sizes, list) or not all(type(size) is int and 0 < size <= 1 << 14 for size in sizes):
            raise BadInput(f"{path}: pretrained_cfg.{key} must be a list of sizes from 1 to {1 << 14}; correct it")


def checked_structure(path: Path, structure: object) -> dict[str, tuple[int, ...]]:
    """Return a structure: shape by name of group.

    Raises:
        BadInput: a name or shape is none.
    """
    where = f"{path}: vitprune.structure"
    if not isinstance(structure, dict) or len(structure) > MAX_LENGTH:
        raise BadInput(f"{where} must map group names to lists of integers; download or save it again")
    for name, shape in structure.items():
        if not GROUP.fullmatch(name):
            raise BadInput(f"{where}: {_quoted(name)} is not a group name; download or save it again")
        if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= MAX_NUMBER for size in shape):
            raise BadInput(f"{where}.{name[:80]} must be a list of integers from 1 to {MAX_NUMBER}; correct it")
    return {name: tuple(shape) for name, shape in structure.items()}


def checked_classes(path: Path, classes: object) -> tuple[int, ...] | None:
    """Return the class of the dense model at every output, as recorded in a config.json; None if there are none.

    Raises:
        BadInput: they are no list of different whole numbers.
    """
    if classes is None:
        return None
    numbers = classes if isinstance(classes, list) and len(classes) <= MAX_NUMBER else []
    if not numbers or not all(type(label) is int and 0 <= label <= MAX_NUMBER for label in numbers):
        raise BadInput(f"{path}: vitprune.classes must be a list of whole numbers; download or save it again")
    if len(set(numbers)) < len(numbers):
        raise BadInput(f"{path}: vitprune.classes names a class twice; correct it")
    return tuple(numbers)


def _quoted(name: str) -> str:
    """An untrusted name, shortened and quoted for a message."""
    return name if len(name) <= 80 and GROUP.fullmatch(name) else repr(name[:80])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
