"""INT8 after training, by onnxruntime: weights per output channel, symmetric, so that every zero stays zero."""

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from vitprune.errors import BadInput
from vitprune.runtime.files import atomic_write

Batch = tuple[Tensor, Tensor]  # (images (B, C, H, W), labels (B,))
WEIGHT_BITS = 7  # processors without VNNI add two products of 8 x 8 bits in 16 bits
IMAGES, BATCH = 128, 16  # that calibrate the ranges of activations; a batch at a time bounds the memory
PERCENTILE = 99.999  # of an activation's values inside its range
LAYERS = ["MatMul", "Gemm", "Conv"]  # what has weights; norms, softmax and GELU stay in float


class CalibrationBatches:
    """Calibration batches as onnxruntime reads them, one range after the other."""

    def __init__(self, images: Tensor):
        self._batches = torch.split(images[:IMAGES], BATCH)
        self._left = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go to the batches of a range."""
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None at the end."""
        batch = next(self._left, None)
        return None if batch is None else {"images": batch.numpy()}


def quantize_and_compare(folder: Path, calibration: Sequence[Batch], evaluation: Iterable[Batch]) -> dict[str, Any]:
    """Quantize the folder's model.onnx to int8.onnx and run both on the same images; returns all that was measured."""
    source, path = folder / "model.onnx", folder / "int8.onnx"
    images = torch.cat([images for images, _ in calibration])
    return quantize_int8(source, path, images) | compare_onnx([source, path], evaluation)


def quantize_int8(
    source: Path, path: Path, images: Tensor, calibration: str = "percentile", weight_bits: int = WEIGHT_BITS
) -> dict[str, Any]:
    """Quantize an exported model's weighted layers and their inputs (QDQ format); returns size and zeros.

    `images` (N, C, H, W), of which the first 128 are used, set the ranges of the activations: `minmax`, `percentile` or
    `entropy`. Weights have 7 bits, as processors without VNNI add two products of 8 bits in 16, or all 8.

    Raises:
        BadInput: the packages of the `export` extra are not installed, the calibration is unknown, or a zero got lost.
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
    options = {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": LAYERS, "CalibStridedMinMax": 1}
    with atomic_write(path) as partial, _quiet():
        quantization.quantize_static(
            source,
            partial,
            CalibrationBatches(images),
            op_types_to_quantize=LAYERS,
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=methods[calibration],
            extra_options=options | ({"CalibPercentile": PERCENTILE} if calibration == "percentile" else {}),
        )
    facts = {"calibration": calibration, "images": min(IMAGES, len(images)), "bytes": path.stat().st_size}
    return facts | count_zeros(source, path)


def count_zeros(source: Path, path: Path) -> dict[str, int]:
    """How many weights are zero before and after, in the layers that were quantized.

    Raises:
        BadInput: a weight that was zero is not any more.
    """
    import onnx
    from onnx import numpy_helper

    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer}
        for file in (source, path)
    )
    found = {"weights": 0, "zeros": 0, "int8_zeros": 0}
    for name, values in before.items():
        if values.ndim < 2 or f"{name}_quantized" not in after:
            continue
        now = after[f"{name}_quantized"] == 0
        if after[f"{name}_zero_point"].any() or not now[values == 0].all():
            raise BadInput(f"{path}: zeros of {name} got lost in quantization; do not use it")
        found["weights"] += values.size
        found["zeros"] += int((values == 0).sum())
        found["int8_zeros"] += int(now.sum())
    return found


def compare_onnx(paths: Sequence[Path], batches: Iterable[Batch]) -> dict[str, float]:
    """Top-1 of the ONNX files in percent, by file name, and on how many images each has the first one's answer."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    sessions = [onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"]) for path in paths]
    right, alike, seen = [0] * len(paths), [0] * len(paths), 0
    for images, labels in batches:
        given = {"images": images.numpy()}
        answers = [session.run(None, given)[0].argmax(1) for session in sessions]  # (B,) each
        for place, answer in enumerate(answers):
            right[place] += int((answer == labels.numpy()).sum())
            alike[place] += int(numpy.sum(answer == answers[0]))
        seen += len(labels)
    names = [path.stem for path in paths]
    found = {f"{name}_top1": 100 * number / seen for name, number in zip(names, right, strict=True)}
    same = zip(names[1:], alike[1:], strict=True)
    return found | {f"{name}_agrees": 100 * number / seen for name, number in same}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's prints, and its advice to optimize a model that the exporter has optimized."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
