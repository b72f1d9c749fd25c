"""Latency of a forward pass, and the machine that it was measured on."""

import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy
import timm
import torch
from torch import Tensor, nn


def latency(models: Sequence[nn.Module], example_input: Tensor, runs: int) -> list[dict[str, float]]:
    """Milliseconds of a forward pass of each model: median, p10 and p90 over `runs`, after a warm-up.

    The models take turns, so that what else the machine does in between meets all of them alike.
    """
    device = next(models[0].parameters()).device
    batch = example_input.to(device)
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model.eval()
    with torch.inference_mode():
        for run in range(-max(3, runs // 5), runs):  # without a progress bar, whose thread would be measured too
            for model, own in zip(models, times, strict=True):
                _wait(device)
                start = time.perf_counter()
                model(batch)
                _wait(device)
                if run >= 0:
                    own.append(1000 * (time.perf_counter() - start))
    return [_spread(own) | {"runs": runs, "batch": len(batch)} for own in times]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine behind a measurement."""
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


def _spread(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[8]}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
