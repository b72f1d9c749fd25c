"""Conversion of an ONNX file to float16 weights and activations by onnxruntime."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.models.export import onnxruntime_call
from vitprune.models.export_check import ExportError, expected_logits, exportable
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.files import atomic_files, path_of_user, size_of
from vitprune.runtime.messages import first_line

FLOAT32_OPERATORS = ["ScatterElements"]  # of merged tokens; onnxruntime's has no float16 on the CPU


@check_arguments()
def onnx_to_fp16(
    source: str | Path, path: str | Path, model: nn.Module, example_input: Tensor, *, dynamic_size: bool = False
) -> dict[str, Any]:
    """Convert an ONNX file to float16 and compare it in onnxruntime. Images and logits remain float32.

    Args:
        source: The file that `export_onnx` wrote.
        path: File to write.
        model: The model that was exported, for the comparison.
        example_input: Images (B, C, H, W) for the comparison.
        dynamic_size: Whether the source has dynamic image sizes; the comparison then includes other sizes.

    Returns:
        `max_abs_diff`, the largest difference of the logits, `bound`, which it must not exceed, and `bytes`.

    Raises:
        BadInput: the packages of the `export` extra are not installed, the file cannot be converted, or gives other
            logits.
    """
    try:
        import onnx
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    except ImportError as error:
        raise BadInput(f"export.fp16: {error.name} is not installed; pip install 'vitprune[export]'") from None
    source, path = path_of_user(source, "source"), path_of_user(path, "path")
    expected = expected_logits(*exportable(model, example_input), dynamic_size)
    blocked = [*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
    try:
        converted = convert_float_to_float16(str(source), keep_io_types=True, op_block_list=blocked)
    except Exception as error:  # of the converter, for each operator another
        raise ExportError(f"export.fp16: {source} cannot be converted ({first_line(error)})") from None
    with atomic_files(path) as unfinished:
        onnx.save(converted, str(unfinished))
        facts: dict[str, Any] = expected.compare("export.fp16", onnxruntime_call(unfinished), "float16")
        facts["bytes"] = size_of(unfinished.parent)
    return facts
