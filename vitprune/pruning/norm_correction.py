"""Norm correction: one damped Gauss-Newton step of norms and biases towards the dense model's logits.

It needs neither labels nor training. Only scales and shifts of norms and biases of layers are changed, few enough
parameters for a few hundred images; the damping is selected by cross-validation on these images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitprune.criteria import Batches, ScoringContext
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.memory import max_batch_size
from vitprune.criteria.moments import record_layer_io
from vitprune.errors import BadInput
from vitprune.evaluation.logits import logits_of
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.norm_axis import norm_axis
from vitprune.runtime.progress import track

DAMPINGS = (1.0, 3.0, 10.0, 30.0)  # relative to the mean squared norm of a row of the Jacobian
DIRECTIONS = 4  # of the logits, per image


@dataclass(frozen=True)
class Corrected:
    """Result of a norm correction.

    Attributes:
        values: New values by parameter name; empty if no step reduces the divergence on held-out images.
        facts: KL divergence from the dense logits on held-out images before and after, in nats per image, and damping.
    """

    values: Mapping[str, Tensor]
    facts: Mapping[str, float]


def dense_logits(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Return the logits of the dense model for every batch, (B, ..., classes) each.

    Raises:
        BadInput: there are fewer than two images.
    """
    if not batches:
        raise BadInput("prune.correct_norms: needs images, and there are none; give calibration batches")
    if sum(len(images) for images, _ in batches) < 2:
        raise BadInput("prune.correct_norms: 1 calibration image; give at least 2, half of them judge the other half")
    return logits_of(model, (images for images, _ in batches))


def correct_norms(model: nn.Module, target: Sequence[Tensor], batches: Batches, context: ScoringContext) -> Corrected:
    """Fit scales and shifts of norms and biases so that the logits approach the target; the model is not changed.

    Minimizes |r - J x|^2 + damping |x|^2, where r are the errors of the logits along a few directions of the target's
    Fisher matrix, image by image, and J is their Jacobian. The damping is the one with the least KL divergence in a
    two-fold cross-validation over the images with even and with odd index. If the Jacobian of all images exceeds
    `config.memory` bytes, evenly spaced images are used.

    Args:
        model: The pruned model.
        target: Logits of the dense model for every batch.
        batches: Calibration batches; labels are not used.
        context: The scoring options.

    Raises:
        BadInput: the model has no scale or bias that the logits depend on, or a layer runs more than once.

    Source: Gauss-Newton for UP-ViTs' score (equation 1) to second order; Martens 2020 for the Fisher matrix as metric.
    """
    layers = _layers(model, batches[0][0][:1])
    if not layers:
        why = "has no scale of a norm and no bias that can be corrected"
        raise BadInput(f"prune.correct_norms: {type(model).__name__} {why}; set it to false")
    names = [name for layer in layers for name in layer.names]
    width = sum(model.get_parameter(name).numel() for name in names)
    total = sum(len(images) for images, _ in batches)
    every = max(1, -(-total * DIRECTIONS * width * next(model.parameters()).element_size() // context.config.memory))
    every = min(every, total - 1)  # two images are the least for the cross-validation
    batches, target = _thinned(batches, target, every)
    system = _system(model, layers, target, batches, context)
    odd = torch.arange(sum(len(images) for images, _ in batches)) % 2 == 1
    before = sum(_divergence(model, {}, target, batches, half) for half in (odd, ~odd)) / 2
    after = {damping: _held_out(model, names, system, damping, target, batches, odd) for damping in DAMPINGS}
    damping = min(after, key=after.__getitem__)
    facts = {"nats_before": before, "nats_after": min(before, after[damping])}
    if after[damping] >= before:
        return Corrected({}, facts)
    return Corrected(_updated(model, names, _step(*system, damping)), facts | {"damping": damping})


def _thinned(batches: Batches, target: Sequence[Tensor], every: int) -> tuple[Batches, list[Tensor]]:
    """Return one of `every` consecutive images of all batches, and its target; batches without one are left out."""
    kept, expected, first = [], [], 0
    for (images, labels), logits in zip(batches, target, strict=True):
        start = -first % every
        first += len(images)
        if start < len(images):
            kept.append((images[start::every], labels[start::every]))
            expected.append(logits[start::every])
    return kept, expected


@dataclass(frozen=True)
class _Layer:
    """A norm, or a layer with a bias: its path, whether it has a scale and a shift, and the axis of its channels."""

    path: str
    scale: bool
    shift: bool
    axis: int

    @property
    def names(self) -> list[str]:
        """Full names of the parameters to correct."""
        return [f"{self.path}.{leaf}" for leaf, present in (("weight", self.scale), ("bias", self.shift)) if present]


def _layers(model: nn.Module, images: Tensor) -> list[_Layer]:
    """Return the norms and layers with a bias that the logits depend on; norms that do more than normalize are not."""
    layers, result = [], []
    for path, module in model.named_modules():
        scale = isinstance(module, nn.LayerNorm | RmsNorm) and module.weight is not None
        shift = isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv2d) and module.bias is not None
        if scale or shift:
            layers.append(_Layer(path, scale, shift, 1 if isinstance(module, nn.Conv2d) else -1))
    device = next(model.parameters()).device
    with eval_mode(model), frozen(model), torch.enable_grad():
        with record_layer_io(model, [layer.path for layer in layers], []) as (inputs, outputs):
            logits = model(images.to(device))
        layers = [layer for layer in layers if layer.path in outputs]
        if not layers:
            return []
        grads = torch.autograd.grad(logits.sum(), [outputs[layer.path] for layer in layers], allow_unused=True)
    for layer, grad in zip(layers, grads, strict=True):
        io, norm = (inputs[layer.path], outputs[layer.path]), model.get_submodule(layer.path)
        axis = norm_axis(norm, *io) if layer.scale else layer.axis
        if grad is not None and axis is not None:
            result.append(replace(layer, axis=axis))
    return result


def _system(
    model: nn.Module, layers: Sequence[_Layer], target: Sequence[Tensor], batches: Batches, context: ScoringContext
) -> tuple[Tensor, Tensor]:
    """Return the Jacobian (rows, values) and the errors (rows,) of the logits, at most DIRECTIONS rows per image."""
    parts, first = [], 0
    with eval_mode(model), frozen(model):
        with record_layer_io(model, [layer.path for layer in layers], []):
            image = batches[0][0][:1].to(target[0].device)
            size = max_batch_size(model, model, image, context.config.memory)
        for (batch, _), logits in track(list(zip(batches, target, strict=True)), "correcting"):
            for images, expected in zip(torch.split(batch, size), torch.split(logits, size), strict=True):
                parts.append(_batch_system(model, layers, expected, images, context.seed, first))
                first += len(images)
    jacobian, errors = zip(*parts, strict=True)
    return torch.cat(jacobian), torch.cat(errors)


def _batch_system(
    model: nn.Module, layers: Sequence[_Layer], target: Tensor, images: Tensor, seed: int, first: int
) -> tuple[Tensor, Tensor]:
    paths = [layer.path for layer in layers]
    with torch.enable_grad(), record_layer_io(model, paths, []) as (inputs, outputs):
        logits = model(images.to(target.device))
    difference = target.double() - logits.detach().double()
    probability, indices = target.double().softmax(dim=-1), range(first, first + len(images))
    rows, errors = [], []
    for direction in fisher_directions(probability, None, DIRECTIONS, seed, indices):
        outer = direction.to(logits.dtype)
        grads = torch.autograd.grad(logits, [outputs[path] for path in paths], outer, retain_graph=True)
        pairs = zip(layers, grads, strict=True)
        parts = [_parameter_grads(model, layer, inputs[layer.path], grad, len(images)) for layer, grad in pairs]
        rows.append(torch.cat(parts, dim=1))
        errors.append((direction * difference).flatten(1).sum(dim=1))
    return torch.stack(rows, dim=1).flatten(0, 1), torch.stack(errors, dim=1).flatten()


def _parameter_grads(model: nn.Module, layer: _Layer, inputs: Tensor, grad: Tensor, images: int) -> Tensor:
    """Return the gradients w.r.t. a layer's scale and shift for every image, (images, values)."""
    by_position = _by_position(grad, layer.axis, images)
    parts = []
    if layer.scale:
        norm: Any = model.get_submodule(layer.path)
        normalize = F.layer_norm if isinstance(norm, nn.LayerNorm) else F.rms_norm
        normal = normalize(inputs.movedim(layer.axis, -1), norm.normalized_shape, eps=norm.eps)
        parts.append((by_position * _by_position(normal, -1, images)).sum(dim=1))
    if layer.shift:
        parts.append(by_position.sum(dim=1))
    return torch.cat(parts, dim=1)


def _by_position(value: Tensor, axis: int, images: int) -> Tensor:
    channels_last = value.movedim(axis, -1)
    # (images, positions, channels); windows of an image are neighbors
    return channels_last.reshape(images, -1, channels_last.shape[-1])


def _held_out(
    model: nn.Module,
    names: Sequence[str],
    system: tuple[Tensor, Tensor],
    damping: float,
    target: Sequence[Tensor],
    batches: Batches,
    odd: Tensor,
) -> float:
    """Return the mean divergence of each half of the images after fitting to the other half, in nats per image."""
    total = 0.0
    for half in (odd, ~odd):
        rows = (~half).repeat_interleave(len(system[1]) // len(odd))  # fewer than DIRECTIONS for very few classes
        values = _updated(model, names, _step(system[0][rows], system[1][rows], damping))
        total += _divergence(model, values, target, batches, half) / 2
    return total


def _divergence(
    model: nn.Module, values: Mapping[str, Tensor], target: Sequence[Tensor], batches: Batches, chosen: Tensor
) -> float:
    """Return the mean KL divergence of the chosen images' logits from the target, with these parameter values."""
    total, first = 0.0, 0
    with eval_mode(model), torch.no_grad():
        for (images, _), expected in zip(batches, target, strict=True):
            indices = chosen[first : first + len(images)].to(expected.device)
            first += len(images)
            inputs = (images.to(expected.device)[indices],)
            log_q = functional_call(model, dict(values), inputs).double().log_softmax(dim=-1)
            log_p = expected[indices].double().log_softmax(dim=-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / int(chosen.sum())


def _step(jacobian: Tensor, errors: Tensor, damping: float) -> Tensor:
    """Solve the damped least squares problem through the Gram matrix of the rows; (values,)."""
    gram = (jacobian @ jacobian.T).double()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    step: Tensor = jacobian.T @ torch.linalg.solve(damped, errors).to(jacobian)
    return step


def _updated(model: nn.Module, names: Sequence[str], step: Tensor) -> dict[str, Tensor]:
    """Return the parameters after a step, by name."""
    old = [model.get_parameter(name).detach() for name in names]
    parts = torch.split(step, [value.numel() for value in old])
    return {name: value + part.view_as(value) for name, value, part in zip(names, old, parts, strict=True)}
