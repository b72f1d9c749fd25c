"""Export to a timm directory and to ONNX, each compared with the original model."""

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitprune import models
from vitprune.errors import BadInput
from vitprune.models.export_check import BOUND, ExportError, example_batch, expected_logits, exportable
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import scoring_mode, unfused_attention
from vitprune.runtime.files import atomic_files, path_of_user, size_of
from vitprune.runtime.messages import first_line

MIN_OPSET = 18  # the oldest that torch writes without a conversion


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
    if not difference <= BOUND["float32"]:
        raise BadInput(f"{directory}: after loading, the logits differ by {difference:.3g}; do not use it")
    return {"loads_plain_timm": plain, "max_abs_diff": difference}


@check_arguments()
def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor,
    *,
    opset: int | None = None,
    dynamic_size: bool = False,
    external_data: bool = False,
) -> dict[str, Any]:
    """Export a model to ONNX with a dynamic batch size, the axis `batch`, and compare it in onnxruntime.

    Args:
        model: The model; it is not changed. A model in half precision is exported with float32 weights.
        path: File to write.
        example_input: Images (B, C, H, W) for tracing and for the comparison.
        opset: Version of ONNX's operators, from 18; None for torch's default.
        dynamic_size: Make the axes `height` and `width` of the images dynamic too; the model must accept other sizes.
        external_data: Write the weights to a second file, PATH.data. Weights of more than 1.5 GiB always are: an ONNX
            file is limited to 2 GB.

    Returns:
        `max_abs_diff`, the largest difference of the logits, `bound`, which it must not exceed, and `bytes`, the size
        of the file or of both files.

    Raises:
        BadInput: the packages of the `export` extra are not installed, the model or the opset cannot be exported, or
            the file gives other logits.
    """
    try:
        import onnx
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # a dependency of onnxscript
    except ImportError as error:
        raise BadInput(f"export.onnx: {error.name} is not installed; pip install 'vitprune[export]'") from None
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        raise BadInput(f"export.opset {opset}: use a number from {MIN_OPSET} to {newest}, or null")
    path = path_of_user(path, "path")
    plain, images = exportable(model, example_input)
    expected = expected_logits(plain, images, dynamic_size)
    program = _onnx_program(plain, images, opset, dynamic_size)
    ClearMetadataAndDocStringPass()(program.model)  # stack traces: paths of this machine
    with atomic_files(path) as unfinished:
        program.save(str(unfinished), external_data=external_data)
        facts: dict[str, Any] = expected.compare("export.onnx", onnxruntime_call(unfinished))
        facts["bytes"] = size_of(unfinished.parent)
    return facts


def onnxruntime_call(path: Path) -> Callable[[Tensor], Any]:
    """Return a function that runs an ONNX file on the CPU: images (B, C, H, W) to logits (B, classes).

    The first call reads the file, see `onnxruntime_session`.
    """
    session = cache(partial(onnxruntime_session, path))
    return lambda images: session().run(None, {"images": images.numpy()})[0]


def onnxruntime_session(path: Path) -> Any:
    """Read an ONNX file into an inference session of onnxruntime on the CPU.

    It uses as many threads as torch does. They end their busy waiting with each call: threads that wait for the next
    call of one model occupy the cores while another one is measured.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _onnx_program(model: nn.Module, images: Tensor, opset: int | None, dynamic_size: bool) -> Any:
    """Return the ONNX program; without fused attention if torch cannot export that, as with a position bias."""
    # names, not torch.export.Dim, which PVT's convolutions would fix
    axes = {0: "batch", 2: "height", 3: "width"} if dynamic_size else {0: "batch"}
    export = partial(
        torch.onnx.export,
        model,
        (example_batch(images),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(axes,),
        dynamo=True,
        verbose=False,
        opset_version=opset,
    )
    with warnings.catch_warnings(), scoring_mode(model):
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        for mode in (contextlib.nullcontext(), unfused_attention(model)):
            try:
                with mode:
                    return export()
            except Exception as error:  # the exporter has errors of its own for each step
                cause = error.__cause__ or error
    raise ExportError(f"export.onnx: torch cannot export this model ({first_line(cause)})")


def _logits(model: nn.Module, example_input: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(example_input)
    return logits
