"""Export to a timm directory and to ONNX, each compared with the original model."""

import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitprune import models
from vitprune.errors import BadInput
from vitprune.runtime.files import atomic_write

TOLERANCE = 1e-3  # of logits: above rounding errors, below the effect of a wrong weight


def export_timm(model: nn.Module, directory: Path, example_input: Tensor) -> dict[str, Any]:
    """Save a model, load it with vitprune and, if all blocks have the same shape, with plain timm, and compare.

    Args:
        model: The model.
        directory: Directory to write.
        example_input: Images (B, C, H, W) for the comparison.

    Returns:
        `loads_plain_timm`, and `max_abs_diff`, the largest difference of the logits.

    Raises:
        BadInput: the loaded model gives different logits.
    """
    models.save(model, directory)
    logits = _logits(model, example_input)
    difference = float((_logits(models.load(directory), example_input) - logits).abs().max())
    plain = True
    try:
        plain_model = timm.create_model(f"local-dir:{directory}", pretrained=True)
        difference = max(difference, float((_logits(plain_model, example_input) - logits).abs().max()))
    except RuntimeError:  # timm cannot build layers of different widths
        plain = False
    if not difference <= TOLERANCE:
        raise BadInput(f"{directory}: after loading, the logits differ by {difference:.3g}; do not use it")
    return {"loads_plain_timm": plain, "max_abs_diff": difference}


def export_onnx(model: nn.Module, path: Path, example_input: Tensor) -> dict[str, Any]:
    """Export a model to ONNX with a dynamic batch size and compare it in onnxruntime.

    Args:
        model: The model; it is moved to the CPU and set to evaluation mode.
        path: File to write.
        example_input: Images (B, C, H, W) for tracing and for the comparison.

    Returns:
        `max_abs_diff`, the largest difference of the logits, and `bytes`, the size of the file.

    Raises:
        BadInput: the packages of the `export` extra are not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it, and its own error is less clear
    except ImportError as error:
        raise BadInput(f"export.onnx: {error.name} is not installed; pip install 'vitprune[export]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            model.eval().cpu(),
            (example_input,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    with atomic_write(path) as partial:
        program.save(str(partial))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": example_input.numpy()})
    difference = float((torch.from_numpy(logits) - _logits(model, example_input)).abs().max())
    return {"max_abs_diff": difference, "bytes": path.stat().st_size}


def _logits(model: nn.Module, example_input: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(example_input)
    return logits
