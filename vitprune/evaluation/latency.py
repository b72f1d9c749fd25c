"""Latency of a forward pass, and the machine that it was measured on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from typing import Any

import numpy
import timm
import torch
from torch import Tensor, nn

from vitprune.data.batch_checks import checked_input
from vitprune.errors import BadInput
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import eval_mode


@check_arguments()
def latency(models: Sequence[nn.Module], example_input: Tensor, runs: int) -> list[dict[str, float]]:
    """Measure the latency of a forward pass of several models.

    The models run alternately, so that other load on the machine affects all of them equally. They run in evaluation
    mode and keep their own mode.

    Args:
        models: Models on the same device.
        example_input: Batch (B, C, H, W), which every model gets in its own type.
        runs: Measured runs per model, after a warm-up of max(3, runs / 5).

    Returns:
        For each model: `median`, `p10` and `p90` in milliseconds, `runs` and `batch`.

    Raises:
        BadInput: there is no model or no run, or a model does not run on the input.
    """
    if not models or runs < 1:
        raise BadInput("latency: give a list of models, as in [model], and at least one run")
    with ExitStack() as modes:
        calls = []
        for model in models:
            modes.enter_context(eval_mode(model))
            batch = checked_input("example_input", example_input, model).to(next(model.parameters()).device)
            calls.append(partial(run_model, model, batch))
        times = alternating_times(calls, runs)
    return [_percentiles(durations) | {"runs": runs, "batch": len(example_input)} for durations in times]


def alternating_times(calls: Sequence[Callable[[], object]], runs: int) -> list[list[float]]:
    """Measure the durations of several calls, which alternate, after a warm-up of max(3, runs / 5).

    Returns:
        For each call its durations in milliseconds, in the order of the runs.
    """
    times: list[list[float]] = [[] for _ in calls]
    for run in range(-max(3, runs // 5), runs):  # no progress bar: its thread would affect the measurement
        for call, durations in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if run >= 0:
                durations.append(1000 * (time.perf_counter() - start))
    return times


@torch.inference_mode()
def run_model(model: nn.Module, batch: Tensor) -> None:
    """Run a forward pass to its end, also on an accelerator."""
    model(batch)
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)


def environment(device: torch.device) -> dict[str, Any]:
    """Return package versions, device, CPU and threads of a measurement."""
    cuda = device.type == "cuda"
    return {
        "vitprune": metadata.version("vitprune"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def _percentiles(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[8]}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or platform.machine()
