"""Conversion of an ONNX file to OpenVINO's format IR: NAME.xml with the graph and NAME.bin with the weights."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.models.export_check import ExportError, expected_logits, exportable
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.files import atomic_files, path_of_user, size_of
from vitprune.runtime.messages import first_line

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # the default is bfloat16 on processors that have it


@check_arguments()
def onnx_to_openvino(
    source: str | Path, path: str | Path, model: nn.Module, example_input: Tensor, *, dynamic_size: bool = False
) -> dict[str, Any]:
    """Convert an ONNX file to OpenVINO IR with float32 weights, and compare it in OpenVINO computing in float32.

    Args:
        source: The file that `export_onnx` wrote.
        path: File to write, with the suffix .xml; the weights are written beside it, with .bin.
        model: The model that was exported, for the comparison.
        example_input: Images (B, C, H, W) for the comparison.
        dynamic_size: Whether the source has dynamic image sizes; the comparison then includes other sizes.

    Returns:
        `max_abs_diff`, the largest difference of the logits, `bound`, which it must not exceed, and `bytes` of both
        files.

    Raises:
        BadInput: OpenVINO is not installed, the suffix is another, the file cannot be converted, or gives other logits.
    """
    try:
        import openvino
    except ImportError:
        raise BadInput("export.openvino: openvino is not installed; pip install 'vitprune[engine]'") from None
    source, path = path_of_user(source, "source"), path_of_user(path, "path")
    if path.suffix != ".xml":
        raise BadInput(f"{path}: OpenVINO reads files with the suffix .xml; give such a path")
    expected = expected_logits(*exportable(model, example_input), dynamic_size)
    with atomic_files(path) as unfinished:
        try:
            converted = openvino.convert_model(str(source))
            openvino.save_model(converted, str(unfinished), compress_to_fp16=False)
            compiled = openvino.Core().compile_model(str(unfinished), "CPU", FLOAT32)
        except Exception as error:  # of the converter or of the plug-in, for each operator another
            raise ExportError(f"export.openvino: {source} cannot be converted ({first_line(error)})") from None
        facts: dict[str, Any] = expected.compare("export.openvino", lambda images: compiled([images.numpy()])[0])
        facts["bytes"] = size_of(unfinished.parent)
    return facts
