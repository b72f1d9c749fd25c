"""Correction: one damped Gauss-Newton step of norms and biases from a pruned model's answers to the dense model's.

It takes neither labels nor training. What is small enough to be fitted to a few hundred images, the scales and shifts
of norms and the biases of layers, moves once; how far is decided on images that it was not fitted to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitprune.criteria import Batches, ScoringContext
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.memory import max_batch_size, minibatches
from vitprune.criteria.moments import record_layer_io
from vitprune.errors import BadInput
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.progress import track

DAMPINGS = (1.0, 3.0, 10.0, 30.0)  # relative to the mean squared length of a row
PULLS = 4  # directions of the answer per image


@dataclass(frozen=True)
class Corrected:
    """New values by parameter name, empty where no step helped, and what the step did on images that it did not see.

    Facts are the KL divergence from the dense answers, in nats per image, before and after, and the damping.
    """

    values: Mapping[str, Tensor]
    facts: Mapping[str, float]


def dense_logits(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Logits of every batch, as the correction wants them of the dense model; (B, ..., classes) each.

    Raises:
        BadInput: no batches.
    """
    if not batches:
        raise BadInput("prune.correct_norms: needs images, and there are none; give batches")
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad():
        return [model(images.to(device)) for images, _ in batches]


def correct_norms(model: nn.Module, wanted: Sequence[Tensor], batches: Batches, context: ScoringContext) -> Corrected:
    """Scales and shifts of norms and biases that bring the answers nearer to those wanted; the model stays as it is.

    Minimises |r - J x|^2 + damping |x|^2, where r are the errors of the logits along a few directions of the wanted
    answers' Fisher matrix, image by image, and J their slopes. The damping is the one of least KL divergence on the
    images of even position when fitted to the odd ones, and the other way round. At most `config.memory` bytes of
    slopes are held: more images than that are left out, evenly.

    Source: Gauss-Newton on UP-ViTs' score (equation 1) to second order; Martens 2020 for the Fisher matrix as metric.
    """
    layers = _layers(model)
    names = [name for layer in layers for name in layer.names]
    width = sum(model.get_parameter(name).numel() for name in names)
    total = sum(len(images) for images, _ in batches)
    every = max(1, -(-total * PULLS * width * next(model.parameters()).element_size() // context.config.memory))
    some = [(images[::every], labels[::every]) for images, labels in batches]
    aims = [logits[::every] for logits in wanted]
    slopes, errors = _system(model, layers, aims, some, context)
    odd = torch.arange(sum(len(images) for images, _ in some)) % 2 == 1
    before = sum(_distance(model, {}, aims, some, half) for half in (odd, ~odd)) / 2
    tried = {damping: _held_out(model, names, (slopes, errors), damping, aims, some, odd) for damping in DAMPINGS}
    damping = min(tried, key=lambda one: tried[one])
    facts = {"nats_before": before, "nats_after": min(before, tried[damping])}
    if tried[damping] >= before:
        return Corrected({}, facts)
    return Corrected(_moved(model, names, _step(slopes, errors, damping)), facts | {"damping": damping})


@dataclass(frozen=True)
class _Layer:
    """A norm, or a layer with a bias: its path, its own parameters that may move, and the axis of its channels."""

    path: str
    scale: bool
    shift: bool
    axis: int

    @property
    def names(self) -> list[str]:
        """Full names of what may move."""
        return [f"{self.path}.{leaf}" for leaf, there in (("weight", self.scale), ("bias", self.shift)) if there]


def _layers(model: nn.Module) -> list[_Layer]:
    found = []
    for path, module in model.named_modules():
        norm = isinstance(module, nn.LayerNorm)
        shift = isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv2d) and module.bias is not None
        if norm or shift:
            scale = norm and cast(nn.LayerNorm, module).weight is not None
            found.append(_Layer(path, scale, shift, 1 if isinstance(module, nn.Conv2d) else -1))
    return found


def _system(
    model: nn.Module, layers: Sequence[_Layer], wanted: Sequence[Tensor], batches: Batches, context: ScoringContext
) -> tuple[Tensor, Tensor]:
    """Slopes (rows, values) and errors (rows,) of the answers along their directions, PULLS rows per image."""
    found, first = [], 0
    with eval_mode(model), frozen(model):
        with record_layer_io(model, [layer.path for layer in layers], []):
            one = batches[0][0][:1].to(wanted[0].device)
            size = max_batch_size(model, model, one, context.config.memory)
        for (batch, _), aims in track(list(zip(batches, wanted, strict=True)), "correcting"):
            for images, aim in zip(minibatches(batch, size), minibatches(aims, size), strict=True):
                found.append(_of_batch(model, layers, aim, images, context.seed, first))
                first += len(images)
    slopes, errors = zip(*found, strict=True)
    return torch.cat(slopes), torch.cat(errors)


def _of_batch(
    model: nn.Module, layers: Sequence[_Layer], aim: Tensor, images: Tensor, seed: int, first: int
) -> tuple[Tensor, Tensor]:
    paths = [layer.path for layer in layers]
    with torch.enable_grad(), record_layer_io(model, paths, []) as (inputs, outputs):
        logits = model(images.to(aim.device))
    missing = aim.double() - logits.detach().double()
    rows, errors = [], []
    for pull in fisher_directions(aim.double().softmax(dim=-1), None, PULLS, seed, range(first, first + len(images))):
        slopes = torch.autograd.grad(logits, [outputs[p] for p in paths], pull.to(logits.dtype), retain_graph=True)
        parts = [
            _own(model, layer, inputs[layer.path], slope, len(images))
            for layer, slope in zip(layers, slopes, strict=True)
        ]
        rows.append(torch.cat(parts, dim=1))
        errors.append((pull * missing).flatten(1).sum(dim=1))
    return torch.stack(rows, dim=1).flatten(0, 1), torch.stack(errors, dim=1).flatten()


def _own(model: nn.Module, layer: _Layer, given: Tensor, slope: Tensor, images: int) -> Tensor:
    """Slopes by a layer's scale and shift, image by image; (images, values)."""
    by_place = _by_place(slope, layer, images)
    found = []
    if layer.scale:
        norm = cast(nn.LayerNorm, model.get_submodule(layer.path))
        normal = F.layer_norm(given, norm.normalized_shape, None, None, norm.eps)
        found.append((by_place * _by_place(normal, layer, images)).sum(dim=1))
    if layer.shift:
        found.append(by_place.sum(dim=1))
    return torch.cat(found, dim=1)


def _by_place(value: Tensor, layer: _Layer, images: int) -> Tensor:
    moved = value.movedim(layer.axis, -1)
    return moved.reshape(images, -1, moved.shape[-1])  # (images, places, channels); windows of an image are neighbours


def _held_out(
    model: nn.Module,
    names: Sequence[str],
    system: tuple[Tensor, Tensor],
    damping: float,
    wanted: Sequence[Tensor],
    batches: Batches,
    odd: Tensor,
) -> float:
    """Divergence of either half of the images when fitted to the other, in nats per image."""
    total = 0.0
    for half in (odd, ~odd):
        rows = (~half).repeat_interleave(PULLS)
        moved = _moved(model, names, _step(system[0][rows], system[1][rows], damping))
        total += _distance(model, moved, wanted, batches, half) / 2
    return total


def _distance(
    model: nn.Module, values: Mapping[str, Tensor], wanted: Sequence[Tensor], batches: Batches, chosen: Tensor
) -> float:
    """Mean KL divergence of the chosen images' answers from those wanted, with these values in the model."""
    total, first = 0.0, 0
    with eval_mode(model), torch.no_grad():
        for (images, _), aim in zip(batches, wanted, strict=True):
            own = chosen[first : first + len(images)].to(aim.device)
            first += len(images)
            given = (images.to(aim.device)[own],)
            found = functional_call(model, dict(values), given).double().log_softmax(dim=-1)
            right = aim[own].double().log_softmax(dim=-1)
            total += float((right.exp() * (right - found)).sum())
    return total / int(chosen.sum())


def _step(slopes: Tensor, errors: Tensor, damping: float) -> Tensor:
    """Damped least squares by the rows' inner products; (values,)."""
    products = (slopes @ slopes.T).double()
    damped = products + damping * products.diagonal().mean() * torch.eye(len(products)).to(products)
    step: Tensor = slopes.T @ torch.linalg.solve(damped, errors).to(slopes)
    return step


def _moved(model: nn.Module, names: Sequence[str], step: Tensor) -> dict[str, Tensor]:
    """Parameters after a step, by name."""
    old = [model.get_parameter(name).detach() for name in names]
    parts = torch.split(step, [value.numel() for value in old])
    return {name: value + part.view_as(value) for name, value, part in zip(names, old, parts, strict=True)}
