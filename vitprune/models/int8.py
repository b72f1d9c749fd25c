"""Post-training INT8 quantization by onnxruntime: symmetric weights per output channel, so zero is exact."""

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.models.export import onnxruntime_call
from vitprune.models.export_check import ExportError, expected_logits
from vitprune.runtime.files import atomic_files, size_of

Batch = tuple[Tensor, Tensor]  # (images (B, C, H, W), labels (B,))
WEIGHT_BITS = 7  # without VNNI, two products of 8 x 8 bits can overflow 16 bits
IMAGES, BATCH = 128, 16  # for the activation ranges; small batches limit memory
PERCENTILE = 99.999  # of the values of an activation that its range covers
LAYERS = ["MatMul", "Gemm", "Conv"]  # those with weights


class CalibrationBatches:
    """Calibration batches in the interface of onnxruntime's CalibrationDataReader.

    Args:
        images: Images (N, C, H, W); the first 128 are used.
    """

    def __init__(self, images: Tensor):
        self._batches = torch.split(images[:IMAGES], BATCH)
        self._remaining = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Restrict to the batches from `start_index` to before `end_index`."""
        self._remaining = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None at the end."""
        batch = next(self._remaining, None)
        return None if batch is None else {"images": batch.numpy()}


def quantize_and_compare(
    folder: Path, model: nn.Module, calibration: Sequence[Batch], evaluation: Iterable[Batch]
) -> dict[str, Any]:
    """Quantize `model.onnx` of a folder to `int8.onnx` and compare both on the evaluation images.

    Args:
        folder: Folder with model.onnx.
        model: The model that was exported.
        calibration: Batches that set the activation ranges. The logits of the first two images are compared with those
            of the model.
        evaluation: Batches to measure the accuracy on.

    Returns:
        The values of `quantize_int8` and of `compare_onnx`, `max_abs_diff` and its `bound`.

    Raises:
        BadInput: as `quantize_int8`, or the logits differ by more than the bound; the file is then deleted.
    """
    source, path = folder / "model.onnx", folder / "int8.onnx"
    images = torch.cat([images for images, _ in calibration])
    facts = quantize_int8(source, path, images)
    try:
        facts |= expected_logits(model, images[:2]).compare("export.int8", onnxruntime_call(path), "int8")
    except ExportError:
        path.unlink()
        raise
    return facts | compare_onnx([source, path], evaluation)


def quantize_int8(
    source: Path, path: Path, images: Tensor, calibration: str = "percentile", weight_bits: int = WEIGHT_BITS
) -> dict[str, Any]:
    """Quantize the layers with weights and their inputs of an ONNX model (QDQ format).

    Args:
        source: The ONNX file in float.
        path: The file to write.
        images: Calibration images (N, C, H, W); the first 128 are used.
        calibration: How activation ranges are set: "minmax", "percentile" or "entropy".
        weight_bits: 7, safe on processors without VNNI, or 8.

    Returns:
        `calibration`, number of `images`, `bytes` of the file, and the counts of `count_zeros`.

    Raises:
        BadInput: the packages of the `export` extra are missing, the calibration is unknown, or a zero weight became
            nonzero.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise BadInput(f"export.int8: {error.name} is not installed; pip install 'vitprune[export]'") from None
    methods = {
        "minmax": quantization.CalibrationMethod.MinMax,
        "percentile": quantization.CalibrationMethod.Percentile,
        "entropy": quantization.CalibrationMethod.Entropy,
    }
    if calibration not in methods:
        raise BadInput(f"calibration {calibration!r}: unknown; use one of {', '.join(methods)}")
    options = {"OpTypesToExcludeOutputQuantization": LAYERS, "CalibStridedMinMax": 1}
    with atomic_files(path) as unfinished, _quiet():
        quantization.quantize_static(
            source,
            unfinished,
            CalibrationBatches(images),
            op_types_to_quantize=LAYERS,
            nodes_to_exclude=_without_weights(source),
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=methods[calibration],
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
            extra_options=options | ({"CalibPercentile": PERCENTILE} if calibration == "percentile" else {}),
        )
        size = size_of(unfinished.parent)
    facts = {"calibration": calibration, "images": min(IMAGES, len(images)), "bytes": size}
    return facts | count_zeros(source, path)


def _without_weights(source: Path) -> list[str]:
    """Return the names of the products of two activations, such as queries and keys."""
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in LAYERS and weights.isdisjoint(node.input)]


def count_zeros(source: Path, path: Path) -> dict[str, int]:
    """Count the zeros of the quantized layers' weights before and after quantization.

    Args:
        source: The ONNX file in float.
        path: The quantized file.

    Returns:
        `weights`, `zeros` before and `int8_zeros` after.

    Raises:
        BadInput: a zero weight became nonzero.
    """
    import onnx
    from onnx import numpy_helper

    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer}
        for file in (source, path)
    )
    counts = {"weights": 0, "zeros": 0, "int8_zeros": 0}
    for name, values in before.items():
        if values.ndim < 2 or f"{name}_quantized" not in after:
            continue
        is_zero = after[f"{name}_quantized"] == 0
        if after[f"{name}_zero_point"].any() or not is_zero[values == 0].all():
            raise BadInput(f"{path}: zero weights of {name} became nonzero in quantization; do not use it")
        counts["weights"] += values.size
        counts["zeros"] += int((values == 0).sum())
        counts["int8_zeros"] += int(is_zero.sum())
    return counts


def compare_onnx(paths: Sequence[Path], batches: Iterable[Batch]) -> dict[str, float]:
    """Measure the top-1 accuracy of ONNX files, and how often they predict the same class as the first.

    Args:
        paths: ONNX files.
        batches: Images (B, C, H, W) and labels (B,).

    Returns:
        `NAME_top1` of every file and `NAME_agrees` of all but the first, in percent.
    """
    calls = [onnxruntime_call(path) for path in paths]
    correct, agreeing, seen = [0] * len(paths), [0] * len(paths), 0
    for images, labels in batches:
        predictions = [call(images).argmax(1) for call in calls]  # (B,) each
        for index, predicted in enumerate(predictions):
            correct[index] += int((predicted == labels.numpy()).sum())
            agreeing[index] += int(numpy.sum(predicted == predictions[0]))
        seen += len(labels)
    names = [path.stem for path in paths]
    top1 = {f"{name}_top1": 100 * number / seen for name, number in zip(names, correct, strict=True)}
    same = zip(names[1:], agreeing[1:], strict=True)
    return top1 | {f"{name}_agrees": 100 * number / seen for name, number in same}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress onnxruntime's output, including its advice to optimize the already optimized model."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
