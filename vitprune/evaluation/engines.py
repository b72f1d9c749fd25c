"""Run a model in an inference engine: PyTorch, onnxruntime or OpenVINO."""

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import BadInput
from vitprune.evaluation.latency import run_model
from vitprune.models.export import export_onnx, onnxruntime_session

PACKAGES = {"torch": "torch", "ort": "onnxruntime", "openvino": "openvino"}  # by name of the engine
ENGINES = tuple(PACKAGES)


def check_engine(name: str) -> None:
    """Check that an engine is known and installed.

    Raises:
        BadInput: it is not.
    """
    if name not in ENGINES:
        raise BadInput(f"--on {name!r}: unknown engine; use one of {', '.join(ENGINES)}")
    if find_spec(PACKAGES[name]) is None:
        raise BadInput(f"--on {name}: {PACKAGES[name]} is not installed; pip install 'vitprune[engine,export]'")


def forward_call(model: nn.Module, engine: str, images: Tensor) -> Callable[[], object]:
    """Return a function that runs a model once in an engine, on the CPU or, for torch, on the model's device.

    All engines use as many threads as torch does.

    Args:
        model: The model; onnxruntime and OpenVINO get its ONNX export.
        engine: torch, ort or openvino.
        images: Input (B, C, H, W).

    Raises:
        BadInput: the engine is unknown or not installed, or the model cannot be exported.
    """
    check_engine(engine)
    if engine == "torch":
        return partial(run_model, model.eval(), images.to(next(model.parameters()).device))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, images[:1])
        return _openvino_call(path, images) if engine == "openvino" else _onnxruntime_call(path, images)


def _onnxruntime_call(path: Path, images: Tensor) -> Callable[[], object]:
    session, given = onnxruntime_session(path), {"images": images.numpy()}
    return lambda: session.run(None, given)[0]


def _openvino_call(path: Path, images: Tensor) -> Callable[[], object]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    compiled: Any = openvino.Core().compile_model(str(path), "CPU", settings)
    request, given = compiled.create_infer_request(), [images.numpy()]
    return lambda: request.infer(given)
