"""Read and write tensors in safetensors files."""

import errno
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.models.validation import FLOATS, check_fit, read_header
from vitprune.runtime.files import atomic_write


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        BadInput: it is missing or not a safetensors file.
    """
    try:
        return dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the path of a safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a safetensors file ({error})") from None


def read_optional_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; none if there is no such file.

    Raises:
        BadInput: it is not a safetensors file.
    """
    return read_weights(path) if path.exists() else {}


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, atomically. Tensors that share memory are copied."""
    plain: dict[str, Tensor] = {}
    pointers: set[int] = set()
    for name, tensor in tensors.items():
        array = tensor.detach().cpu().contiguous()
        pointer = array.untyped_storage().data_ptr()
        plain[name] = array.clone() if pointer in pointers else array  # a module with two names, or a view
        pointers.add(pointer)
    with atomic_write(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors lets nobody else read its files
        try:
            safetensors.torch.save_file(plain, partial, metadata={"format": "pt"})
            partial.chmod(mode)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file's weights into a model; all must match.

    Raises:
        BadInput: a weight is missing, unknown, not finite, or of another shape or type.
    """
    check_fit(path, read_header(path), model.state_dict(), type(model).__name__)
    tensors = read_weights(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            problem = "has values that are not finite; the training diverged, do not use it"
            raise BadInput(f"{path}: weight {name} {problem}")
    model.load_state_dict(tensors, strict=True)


def load_in_type(model: nn.Module, path: Path) -> None:
    """Convert a model to the floating-point type of a file, and load the file's weights.

    Raises:
        BadInput: as `load_weights`.
    """
    types = {FLOATS[entry.dtype] for entry in read_header(path).values() if entry.dtype in FLOATS}
    if types:
        model.to(types.pop())
    load_weights(model, path)
