"""Export to a timm directory and to ONNX, each compared with the original model."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitprune import models
from vitprune.data.batch_checks import checked_input
from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import scoring_mode, unfused_attention
from vitprune.runtime.files import atomic_write, path_of_user
from vitprune.runtime.messages import first_line
from vitprune.runtime.model_checks import checked_model, float_type

MIN_OPSET = 18  # the oldest that torch writes without a conversion
TOLERANCE = 1e-3  # of logits: above rounding errors, below the effect of a wrong weight


class ExportError(BadInput):
    """A model that ONNX cannot represent, or that onnxruntime does not run."""


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


def export_onnx(
    model: nn.Module, path: str | Path, example_input: Tensor, *, opset: int | None = None
) -> dict[str, Any]:
    """Export a model to ONNX with a dynamic batch size, the axis `batch`, and compare it in onnxruntime.

    Args:
        model: The model; it is not changed. A model in half precision is exported with float32 weights.
        path: File to write.
        example_input: Images (B, C, H, W) for tracing and for the comparison.
        opset: Version of ONNX's operators, from 18; None for torch's default.

    Returns:
        `max_abs_diff`, the largest difference of the logits, and `bytes`, the size of the file.

    Raises:
        BadInput: the packages of the `export` extra are not installed, the model or the opset cannot be exported, or
            the file gives other logits.
    """
    try:
        import onnx
        import onnxruntime
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # a dependency of onnxscript
    except ImportError as error:
        raise BadInput(f"export.onnx: {error.name} is not installed; pip install 'vitprune[export]'") from None
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        raise BadInput(f"export.opset {opset}: use a number from {MIN_OPSET} to {newest}, or null")
    path, plain = path_of_user(path, "path"), checked_model(model)
    with torch.inference_mode(False):
        plain = copy.deepcopy(plain).cpu().eval()
    plain = plain.float() if float_type(plain).itemsize < torch.float32.itemsize else plain
    images = checked_input("example_input", example_input, plain).cpu()
    program = _onnx_program(plain, images, opset)
    ClearMetadataAndDocStringPass()(program.model)  # stack traces: paths of this machine
    with atomic_write(path) as unfinished:
        program.save(str(unfinished))
        try:
            session = onnxruntime.InferenceSession(str(unfinished), providers=["CPUExecutionProvider"])
            (logits,) = session.run(None, {"images": images.numpy()})
        except Exception as error:  # onnxruntime has errors of its own for each cause
            raise ExportError(f"export.onnx: onnxruntime does not run the model ({first_line(error)})") from None
        expected = _logits(plain, images)
        difference = float((torch.from_numpy(logits) - expected).abs().max())
        if not difference <= TOLERANCE * (1 + float(expected.abs().max())):
            raise ExportError(
                f"export.onnx: in onnxruntime, the logits differ by {difference:.3g}; the file was deleted"
            )
    return {"max_abs_diff": difference, "bytes": path.stat().st_size}


def _onnx_program(model: nn.Module, images: Tensor, opset: int | None) -> Any:
    """Return the ONNX program; without fused attention if torch cannot export that, as with a position bias.

    Raises:
        BadInput: the model cannot be exported.
    """
    export = partial(
        torch.onnx.export,
        model,
        (torch.cat([images, images])[:2],),  # a batch of one image would fix the batch size
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # a name, not a torch.export.Dim, which PVT's convolutions would fix
        dynamo=True,
        verbose=False,
        opset_version=opset,
    )
    with warnings.catch_warnings(), scoring_mode(model):
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        try:
            return export()
        except Exception:  # the exporter has errors of its own for each step
            with unfused_attention(model):
                return _refuse_failure(export)


def _refuse_failure(export: Callable[[], Any]) -> Any:
    try:
        return export()
    except Exception as error:
        cause = error.__cause__ or error
        raise ExportError(f"export.onnx: torch cannot export this model ({first_line(cause)})") from None


def _logits(model: nn.Module, example_input: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(example_input)
    return logits
