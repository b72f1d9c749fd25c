"""What leaves the pipeline: a timm directory and an ONNX file, each checked against the model it came from."""

import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitprune import models
from vitprune.errors import BadInput
from vitprune.runtime.files import atomic_write

TOLERANCE = 1e-3  # of logits, far above rounding and far below a wrong weight


def export_timm(model: nn.Module, directory: Path, example_input: Tensor) -> dict[str, Any]:
    """Save a model and load it back, with vitprune and, if its blocks are all alike, with plain timm.

    Returns whether plain timm loads it, and the largest difference of the logits.

    Raises:
        BadInput: what was loaded back is another function.
    """
    models.save(model, directory)
    answer = _answer(model, example_input)
    difference = float((_answer(models.load(directory), example_input) - answer).abs().max())
    plain = True
    try:
        theirs = timm.create_model(f"local-dir:{directory}", pretrained=True)
        difference = max(difference, float((_answer(theirs, example_input) - answer).abs().max()))
    except RuntimeError:  # layers of different widths: timm has no words for them
        plain = False
    if not difference <= TOLERANCE:
        raise BadInput(f"{directory}: loaded again, its logits differ by {difference:.3g}; do not use it")
    return {"loads_plain_timm": plain, "max_abs_diff": difference}


def export_onnx(model: nn.Module, path: Path, example_input: Tensor) -> dict[str, Any]:
    """Export a model to ONNX with a free batch size and compare it in onnxruntime; returns difference and size.

    Raises:
        BadInput: the packages of the `export` extra are not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it and says so less clearly
    except ImportError as error:
        raise BadInput(f"export.onnx: {error.name} is not installed; pip install 'vitprune[export]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations, nothing a user can act on
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
    difference = float((torch.from_numpy(logits) - _answer(model, example_input)).abs().max())
    return {"max_abs_diff": difference, "bytes": path.stat().st_size}


def _answer(model: nn.Module, example_input: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(example_input)
    return answer
