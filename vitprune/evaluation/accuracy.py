"""What a model does and costs: accuracy, parameters, MACs, latency."""

import os
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitprune.architectures import find_groups
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within
from vitprune.runtime.eval_mode import evaluating, frozen
from vitprune.runtime.progress import track


@dataclass(frozen=True)
class Counts:
    """Cost of one image. `nominal_macs` spreads the zeros evenly over the prunable layers, as DIMAP's paper does;
    `nonzero_macs` counts each layer's own.
    """

    params: int
    nonzero_params: int
    macs: int
    nonzero_macs: int
    nominal_macs: int


def count(model: nn.Module, example_input: Tensor) -> Counts:
    """Parameters and multiply-accumulates of one image; `example_input` (B, C, H, W) gives its size.

    MACs are half the FLOPs of matrix products, convolutions and attention, counted with fused attention off (it
    is under-counted on CPU otherwise).
    """
    total, per_layer = macs(model, example_input[:1])
    zeros = {name: _zero_share(model.get_parameter(f"{name}.weight")) for name in per_layer}
    parameters = list(model.parameters())
    return Counts(
        params=sum(p.numel() for p in parameters),
        nonzero_params=sum(int(p.count_nonzero()) for p in parameters),
        macs=total,
        nonzero_macs=total - round(sum(macs * zeros[name] for name, macs in per_layer.items())),
        nominal_macs=total - _nominal_saving(model, per_layer),
    )


def costs(model: nn.Module, groups: Sequence[Group], example_input: Tensor) -> dict[str, tuple[int, int]]:
    """Per group: the weights that go if all of it goes, and the MACs of one image in the layers that it cuts."""
    per_layer = macs(model, example_input[:1])[1]
    found = {}
    for group in groups:
        inner = {path for paths in group.sublayers for path in paths}
        names = dict.fromkeys(part.param for part in group.slices)
        names |= dict.fromkeys(name for name, _ in model.named_parameters() if is_within(name, inner))
        weights = sum(model.get_parameter(name).numel() for name in names)
        found[group.name] = weights, sum(per_layer.get(name.removesuffix(".weight"), 0) for name in names)
    return found


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], Tensor]:
    """Top-1 and top-5 in percent, and the predicted class of every image (N,)."""
    device = next(model.parameters()).device
    right1 = right5 = seen = 0
    predictions = []
    with torch.no_grad(), evaluating(model):
        for images, labels in track(batches, "evaluating"):
            logits = model(images.to(device)).float().cpu()  # (B, classes)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == labels.cpu().unsqueeze(1)
            right1, right5, seen = right1 + int(hits[:, 0].sum()), right5 + int(hits.sum()), seen + len(labels)
            predictions.append(best[:, 0])
    if not seen:
        raise BadInput("evaluate: there is no image to evaluate on; check the eval split")
    return {"top1": 100 * right1 / seen, "top5": 100 * right5 / seen}, torch.cat(predictions)


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


def _spread(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[8]}


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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch fused attention off inside the model while counting."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def macs(model: nn.Module, image: Tensor) -> tuple[int, dict[str, int]]:
    """MACs of the whole model, and of every Linear and Conv2d layer by name."""
    layers = _Layers(model)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(model), frozen(model), _plain_attention(model), counter, layers:
        model(_for(model, image))
    return int(counter.get_total_flops() // 2), layers.macs


class _Layers(TorchFunctionMode):
    """Counts MACs where weights are used: some attentions of timm use those of a layer without calling it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        self.names = {id(layer.weight): name for name, layer in layers}
        self.macs: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            weight = kwargs["weight"] if kwargs and "weight" in kwargs else args[1]
            name = self.names.get(id(weight))
            if name is not None:  # every weight of a channel's row is used once per output position
                used = output.numel() // weight.shape[0] * weight.numel()
                self.macs[name] = self.macs.get(name, 0) + used
        return output


def _for(model: nn.Module, given: Tensor) -> Tensor:
    """The input on the model's device, and in the type of its weights unless it is whole numbers (tokens)."""
    weight = next(model.parameters())
    return given.to(weight) if given.is_floating_point() else given.to(weight.device)


def _zero_share(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


def _nominal_saving(model: nn.Module, per_layer: dict[str, int]) -> int:
    """MACs saved if every prunable layer had the mean sparsity of all of them. Source: DIMAP, table 1."""
    try:
        groups = find_groups(model, ["weight"])
    except BadInput:  # a model without groups has no prunable layers to average over
        return 0
    weights = [model.get_parameter(group.name) for group in groups]
    zeros = sum(w.numel() - int(w.count_nonzero()) for w in weights)
    prunable = sum(per_layer.get(group.name.removesuffix(".weight"), 0) for group in groups)
    return round(prunable * zeros / sum(w.numel() for w in weights))
