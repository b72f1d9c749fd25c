"""Residual channels of plain ViTs: basis of the stream, energy of its channels, refit of the layers that read it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitprune.architectures.stream_rotation import rotate_stream, stream_layers
from vitprune.criteria import Batches, ScoringContext, Statistics
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.memory import max_batch_size
from vitprune.criteria.moments import record_layer_io
from vitprune.criteria.obs.unit_elimination import ridge_refit
from vitprune.errors import BadInput
from vitprune.models.equality import same_logits
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.progress import track

TINY = 1e-300


def stream_basis(model: nn.Module, batches: Batches, context: ScoringContext) -> Tensor:
    """Return the eigenvectors of the importance matrix of the residual stream as a basis for `rotate_stream`.

    Args:
        model: A plain ViT, see `stream_layers`.
        batches: Calibration batches; labels are not used.
        context: The scoring options (`memory`, number of Fisher directions, seed).

    Returns:
        An orthogonal matrix (d, d) in float64; its columns are the new channels, the most important first.

    Raises:
        BadInput: no batches, or the stream cannot be rotated.

    Source: SliceGPT (Ashkboos et al., ICLR 2024) with one basis for all blocks; the importance is ours.
    """
    if not batches:
        raise BadInput("prune.rotate_residual: needs images, and there are none; give calibration batches")
    stream_layers(model)
    plain = rotate_stream(copy.deepcopy(model), torch.eye(cast(Any, model).embed_dim))
    vectors: Tensor = torch.linalg.eigh(importance_matrix(plain, batches, context)).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign()).contiguous()  # the sign is free, and would differ between machines


def importance_matrix(model: nn.Module, batches: Batches, context: ScoringContext) -> Tensor:
    """Return the importance of the channels of the residual stream to the layers that read it; (d, d) in float64.

    It is the sum of C^1/2 M C^1/2 / 2 over all norms. C is the second moment of the norm's output. M is the Fisher
    metric of this output plus its mean eigenvalue: the first part is the loss in nats per image of removing a channel,
    the second stands for the norms, which read the energy of all channels.
    """
    width, images = cast(Any, model).embed_dim, sum(len(part) for part, _ in batches)
    total = torch.zeros(width, width, dtype=torch.float64)
    for metric, moment in _norm_moments(model, list(stream_layers(model).readers), batches, context).values():
        root = _root(moment * (width / moment.trace().clamp_min(TINY)))
        total += root @ (metric + metric.diagonal().mean() * torch.eye(width)) @ root / (2 * images)
    return total


def rotated(model: nn.Module, matrix: Tensor, images: Tensor) -> nn.Module:
    """Return a copy of a plain ViT with a rotated residual stream, after a comparison of the logits in float64.

    Args:
        model: The model; it is not changed.
        matrix: Orthogonal, (d, d); its columns are the new channels.
        images: A few images for the comparison.

    Raises:
        BadInput: the stream cannot be rotated, or the logits differ.
    """
    exact = copy.deepcopy(model).cpu().double()
    if not same_logits(exact, rotate_stream(copy.deepcopy(exact), matrix), images.double()):
        raise BadInput(
            f"{type(model).__name__}: its logits change when the residual stream is rotated; "
            "set prune.rotate_residual to false"
        )
    return rotate_stream(copy.deepcopy(model), matrix)


def stream_readers(model: nn.Module) -> list[str]:
    """Return the paths of all layers that read a rotated residual stream.

    Raises:
        BadInput: the stream is not rotated.
    """
    readers = stream_layers(model).readers
    norm = next(iter(readers))
    if isinstance(model.get_submodule(norm), nn.LayerNorm):
        raise BadInput(f"{norm}: is a LayerNorm, unit-obs needs a rotated stream; set prune.rotate_residual to true")
    return [path for paths in readers.values() for path in paths]


def refit_readers(
    model: nn.Module, statistics: Statistics, mask: Tensor, updated: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the layers that read the stream, refitted to their dense outputs on the kept channels, by parameter name.

    An RmsNorm divides by the root mean square of the kept channels instead of all channels; the refitted weights
    contain the mean of this factor.

    Args:
        model: The model before the removal.
        statistics: PATH/inputs (folds, d+1, d+1) of every layer that reads the stream.
        mask: Kept channels, (d,).
        updated: Weights and biases that replace those of the model, by parameter name.
    """
    result: dict[str, Tensor] = {}
    kept = mask.flatten().nonzero().flatten()
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters()} | dict(updated)
    for norm, paths in stream_layers(model).readers.items() if len(kept) < mask.numel() else ():
        energy = _energy(model, norm, paths[0], statistics)
        factor = (energy[kept].mean() / energy.mean()).sqrt()
        for path in paths:
            dense = parameters[f"{path}.weight"], parameters.get(f"{path}.bias")
            weight, bias = ridge_refit(*dense, statistics[f"{path}/inputs"], kept)
            result[f"{path}.weight"] = weight * factor
            if bias is not None:
                result[f"{path}.bias"] = bias
    return result


def _energy(model: nn.Module, norm: str, reader: str, statistics: Statistics) -> Tensor:
    """Return the mean square of every channel of the stream after a norm, without its learned scale; (d,)."""
    inputs = statistics[f"{reader}/inputs"].sum(dim=0)
    energy: Tensor = inputs.diagonal()[:-1] / inputs[-1, -1]
    scale = dict(model.named_parameters()).get(f"{norm}.weight")
    return energy if scale is None else energy / scale.detach().cpu().double().square().clamp_min(TINY)


def _norm_moments(
    model: nn.Module, norms: Sequence[str], batches: Batches, context: ScoringContext
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sums of g g^T and x x^T over all tokens that are read, for every norm's output x with gradient g."""
    device, first = next(model.parameters()).device, context.first
    total: dict[str, tuple[Tensor, Tensor]] = {}
    with eval_mode(model), frozen(model):
        with record_layer_io(model, [], norms):
            size = max_batch_size(model, model, batches[0][0][:1].to(device), context.config.memory)
        for batch, _ in track(batches, "finding the important directions of the stream"):
            for images in torch.split(batch, size):
                for path, sums in _of_images(model, norms, images.to(device), context, first).items():
                    before = total.get(path, (0.0, 0.0))
                    total[path] = before[0] + sums[0], before[1] + sums[1]
                first += len(images)
    return total


def _of_images(
    model: nn.Module, norms: Sequence[str], images: Tensor, context: ScoringContext, first: int
) -> dict[str, tuple[Tensor, Tensor]]:
    with torch.enable_grad(), record_layer_io(model, [], norms) as (_, outputs):
        logits = model(images)
    values = [outputs[path] for path in norms]
    metrics, read = [torch.zeros(()).double() for _ in norms], [torch.zeros(()).bool().to(images.device) for _ in norms]
    probability, where = logits.detach().double().softmax(dim=-1), range(first, first + len(images))
    for direction in fisher_directions(probability, None, context.config.directions(), context.seed, where):
        grads = torch.autograd.grad(logits, values, direction.to(logits.dtype), retain_graph=True)
        for index, grad in enumerate(part.flatten(0, -2) for part in grads):
            metrics[index] = metrics[index] + (grad.T @ grad).double().cpu()
            read[index] = read[index] | grad.ne(0).any(dim=-1)
    inputs = [value.detach().flatten(0, -2)[used] for value, used in zip(values, read, strict=True)]
    moments = [(rows.T @ rows).double().cpu() for rows in inputs]
    return dict(zip(norms, zip(metrics, moments, strict=True), strict=True))


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root
