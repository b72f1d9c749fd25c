"""Gradients of the loss w.r.t. weights: one per image, or one per batch as in CAP."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.criteria import Batches, ScoringContext, layer_io
from vitprune.criteria.obs.weight_blocks import BlockRange
from vitprune.errors import BadInput
from vitprune.evaluation.losses import labeled_loss, loss_at
from vitprune.runtime.eval_mode import eval_mode, frozen
from vitprune.runtime.hooks import forward_hooks

GradientChunk = tuple[BlockRange, Tensor]  # gradients (m, weights) in the precision of the model
LayerCalls = list[tuple[Tensor, Tensor]]  # (input, output) of every call of a layer

GRADIENTS_AT_ONCE = 32  # gradients of batches stacked at once
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop, the defaults of timm
SEED_STRIDE = 1 << 20  # between the seeds of two cycles, larger than the number of batches


def count_gradients(batches: Batches, context: ScoringContext) -> int:
    """Return how many gradients are taken: `num_gradients`, or one per image (or batch) if it is None.

    Raises:
        BadInput: no images, or fewer than one batch.
    """
    if not batches:
        raise BadInput("Fisher blocks: need images with labels; give calibration batches")
    if context.config.num_gradients is not None:
        return context.config.num_gradients
    images = sum(len(labels) for _, labels in batches)
    number = images if context.config.per_sample else images // context.config.gradient_batch
    if not number:
        raise BadInput(
            f"score.gradient_batch {context.config.gradient_batch}: there are only {images} images; lower it, give "
            "score.num_gradients, or set score.per_sample"
        )
    return number


def weight_gradients(
    model: nn.Module, parts: Sequence[BlockRange], batches: Batches, context: ScoringContext, done: int = 0
) -> Iterator[GradientChunk]:
    """Yield this process's gradients w.r.t. the weights of block ranges, several at a time; zero for zero weights.

    The loss is the mean cross-entropy of one image (`per_sample`) or of `gradient_batch` images. The model is in eval
    mode and runs in its own precision, without TF32.

    Args:
        model: The model.
        parts: Block ranges; each is yielded once per round.
        batches: Labeled calibration batches.
        context: The scoring options.
        done: Number of rounds to skip (one batch of images, or `GRADIENTS_AT_ONCE` gradients of batches, each).

    Raises:
        BadInput: too few images, or a weight that is not used in the forward pass.
    """
    number = count_gradients(batches, context)
    device = next(model.parameters()).device
    masks = {part: _flat(model, part) != 0 for part in parts}
    if context.config.per_sample:
        stream = augmented_images(batches, number, context.seed, partial(_is_pending, context, done=done))
        take = _per_image
    else:
        stream = augmented_images(batches, number * context.config.gradient_batch, context.seed)
        take = partial(_per_batch, context=context, done=done)
    with eval_mode(model), frozen(model), highest_matmul_precision():
        for part, values in take(model, parts, ((x.to(device), y.to(device)) for x, y in stream)):
            yield part, values * masks[part]


@contextmanager
def highest_matmul_precision() -> Iterator[None]:
    """Compute float32 matrix products without TF32 while the context is open."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_pending(context: ScoringContext, number: int, done: int) -> bool:
    """Return whether gradient (batch) `number` belongs to this process and was not taken before."""
    return context.dist.owns(number) and number // context.dist.size >= done


def _flat(model: nn.Module, part: BlockRange) -> Tensor:
    return model.get_parameter(part.param).detach().flatten()[part.start : part.stop]


def _per_image(
    model: nn.Module, parts: Sequence[BlockRange], stream: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[GradientChunk]:
    layers = {part.param: model.get_submodule(part.param.rpartition(".")[0]) for part in parts}
    weights = {param: layer for param, layer in layers.items() if param.endswith(".weight")}
    plain = {param: layer for param, layer in weights.items() if layer_io.is_plain_layer(layer)}
    other_parts = [part for part in parts if part.param not in plain]
    for images, labels in stream:
        calls = _run(model, plain, images, labels)
        for part in parts:
            if part.param in plain:
                grads = [_products(layers[part.param], part, len(images), *call) for call in calls[part.param]]
                yield part, torch.stack(grads).sum(dim=0) if len(grads) > 1 else grads[0]
        if other_parts:
            ones = zip(images[:, None], labels[:, None], strict=True)
            yield from _stacked([_mean_gradients(model, other_parts, image, label) for image, label in ones])


def _run(model: nn.Module, layers: dict[str, nn.Module], images: Tensor, labels: Tensor) -> dict[str, LayerCalls]:
    """Record every layer's inputs, and the gradients of each image's loss w.r.t. its outputs."""
    calls: dict[str, LayerCalls] = {param: [] for param in layers}
    if not layers:
        return calls

    def record(param: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output if output.requires_grad else output.detach().requires_grad_()  # leaf of the backward pass
        calls[param].append((inputs[0].detach().clone(), leaf))
        return leaf.clone()  # what follows may change it in place, as the input above

    hooks = [(layer, partial(record, param)) for param, layer in layers.items()]
    with torch.enable_grad(), forward_hooks(hooks):
        loss = labeled_loss(model, model(images), labels) * len(images)
    _refuse_unused(calls, [param for param, recorded in calls.items() if recorded])
    leaves = [(param, read, output) for param, recorded in calls.items() for read, output in recorded]
    grads = torch.autograd.grad(loss, [output for *_, output in leaves], allow_unused=True)
    used: dict[str, LayerCalls] = {}
    for (param, read, _), grad in zip(leaves, grads, strict=True):
        if grad is not None:
            used.setdefault(param, []).append((read, grad))
    _refuse_unused(calls, used)
    return used


def _products(layer: nn.Module, part: BlockRange, images: int, read: Tensor, grad: Tensor) -> Tensor:
    """Return per-image gradients w.r.t. a block range of a layer's weight from one call; (images, weights)."""
    read, grad = layer_io.layer_inputs(layer, read, images), layer_io.layer_outputs(layer, grad, images)
    width = read.shape[-1]
    first, last = part.start // width, -(-part.stop // width)  # rows of the weight that the range overlaps
    rows = grad[..., first:last].transpose(1, 2) @ read
    return rows.flatten(1)[:, part.start - first * width : part.stop - first * width]


def _per_batch(
    model: nn.Module,
    parts: Sequence[BlockRange],
    stream: Iterator[tuple[Tensor, Tensor]],
    context: ScoringContext,
    done: int,
) -> Iterator[GradientChunk]:
    held: list[dict[BlockRange, Tensor]] = []
    missing, number = 0, -1
    for images, labels in stream:
        while len(images):
            if not missing:
                missing, number = context.config.gradient_batch, number + 1
                if len(held) == GRADIENTS_AT_ONCE:
                    yield from _stacked(held)
                if _is_pending(context, number, done * GRADIENTS_AT_ONCE):
                    held.append({part: torch.zeros_like(_flat(model, part)) for part in parts})
            used_images = min(missing, len(images))
            if _is_pending(context, number, done * GRADIENTS_AT_ONCE):
                for part, grad in _mean_gradients(model, parts, images[:used_images], labels[:used_images]).items():
                    held[-1][part] += grad * (used_images / context.config.gradient_batch)
            missing, images, labels = missing - used_images, images[used_images:], labels[used_images:]
    yield from _stacked(held)


def _stacked(held: list[dict[BlockRange, Tensor]]) -> Iterator[GradientChunk]:
    for part in held[0] if held else ():
        yield part, torch.stack([grads[part] for grads in held])
    held.clear()


def _mean_gradients(
    model: nn.Module, parts: Sequence[BlockRange], images: Tensor, labels: Tensor
) -> dict[BlockRange, Tensor]:
    """Return the gradient of the mean loss of some images, (weights,) by part."""
    named = {part.param: model.get_parameter(part.param).detach().requires_grad_() for part in parts}
    with torch.enable_grad():
        loss = loss_at(model, named, images, labels)
    leaves = list(named.values())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    by_param = {param: grad for param, grad in zip(named, grads, strict=True) if grad is not None}
    _refuse_unused(named, by_param)
    return {part: by_param[part.param].flatten()[part.start : part.stop] for part in parts}


def _refuse_unused(params: Iterable[str], used: Container[str]) -> None:
    unused = [param for param in params if param not in used]
    if unused:
        raise BadInput(f"{unused[0]}: is not used in the forward pass and has no gradient; exclude it")


def augmented_images(
    batches: Batches, number: int, seed: int, owns: Callable[[int], bool] = lambda batch: True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `number` images with labels in batches: first the images as they are, then random crops and flips of them.

    Args:
        batches: The images, (B, C, H, W), and their labels.
        number: Number of images.
        seed: Seed of the crops.
        owns: Filter of batch numbers, counted over all passes.

    Raises:
        BadInput: `number` exceeds the images, and they cannot be cropped.
    """
    count, batch_index = 0, 0
    while count < number:
        for images, labels in batches:
            used_images, first = images[: number - count], batch_index < len(batches)
            if owns(batch_index) and len(used_images):
                generator = torch.Generator().manual_seed(seed * SEED_STRIDE + batch_index)
                yield (used_images if first else random_crops(used_images, generator)), labels[: len(used_images)]
            count, batch_index = count + len(used_images), batch_index + 1


def random_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random resized crop (8 to 100 % of the area) of each image, flipped with probability 1/2.

    Raises:
        BadInput: the images are not (B, C, H, W).

    Source: timm's RandomResizedCrop, the augmentation of CAP's gradients.
    """
    if images.dim() != 4:
        raise BadInput(f"score.num_gradients: inputs of shape {list(images.shape[1:])} cannot be cropped; lower it")
    return torch.stack([_random_crop(image, generator) for image in images])


def _random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[1:]
    area, ratio, down, right, side = torch.rand(5, generator=generator).tolist()
    share = (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0])) * height * width
    aspect = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** ratio
    h, w = (min(most, max(1, round((share * by) ** 0.5))) for most, by in ((height, 1 / aspect), (width, aspect)))
    top, left = round(down * (height - h)), round(right * (width - w))
    part = image[None, :, top : top + h, left : left + w]
    resized = F.interpolate(part, (height, width), mode="bicubic", antialias=True)[0]
    return resized.flip(2) if side < 0.5 else resized
