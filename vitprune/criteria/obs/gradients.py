"""Gradients of the loss by the weights: one per image, or one per batch as CAP takes them."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vitprune.criteria import Batches, ScoreConfig, layer_io
from vitprune.criteria.obs.weight_blocks import Part
from vitprune.errors import BadInput
from vitprune.evaluation.losses import cross_entropy
from vitprune.runtime.eval_mode import evaluating, frozen

Chunk = tuple[Part, Tensor]  # gradients by the weights of a part, (gradients, weights), float32 as the model is
Calls = list[tuple[Tensor, Tensor]]  # what a layer read and what it gave, call by call

HELD = 32  # gradients of batches that are summed up at once
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop, as timm draws them
ONE_SEED = 1 << 20  # batches apart, so that no two batches of no two cycles draw the same


def number_of(batches: Batches, setting: ScoreConfig) -> int:
    """How many gradients are taken: as many as are asked for, or what the images give when each is looked at once.

    Raises:
        BadInput: there is no image, or fewer than one batch of gradients needs.
    """
    if not batches:
        raise BadInput("Fisher blocks: need images with labels; give batches")
    if setting.gradients is not None:
        return setting.gradients
    images = sum(len(labels) for _, labels in batches)
    found = images if setting.per_sample else images // setting.gradient_batch
    if not found:
        raise BadInput(
            f"score.gradient_batch {setting.gradient_batch}: there are only {images} images; lower it, give "
            "score.gradients, or set score.per_sample"
        )
    return found


def gradients(
    model: nn.Module, parts: Sequence[Part], batches: Batches, setting: ScoreConfig, done: int = 0
) -> Iterator[Chunk]:
    """The team's own share of the gradients by the weights of the parts, some at a time; a zero weight has none.

    The loss is the mean cross-entropy of an image, or of a batch of `gradient_batch` images; the model is in evaluation
    mode and computes in its own precision, never in TF32. Every part comes once in a round; the first `done` rounds,
    of a batch of images or of `HELD` gradients, are left out.

    Raises:
        BadInput: there are too few images, or a weight takes no part in the answer.
    """
    number = number_of(batches, setting)
    device = next(model.parameters()).device
    masks = {part: _flat(model, part) != 0 for part in parts}
    if setting.per_sample:
        stream = images_of(batches, number, setting.seed, lambda place: _left(setting, place, done))
        take = _per_image
    else:
        stream = images_of(batches, number * setting.gradient_batch, setting.seed)
        take = partial(_per_batch, done=done)
    with evaluating(model), frozen(model), exactly():
        for part, values in take(model, parts, ((x.to(device), y.to(device)) for x, y in stream), setting):
            yield part, values * masks[part]


@contextmanager
def exactly() -> Iterator[None]:
    """Products of matrices in full precision, whatever was allowed before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _left(setting: ScoreConfig, number: int, done: int) -> bool:
    """Whether a piece of work is this process's own, and not among the first that it has done before."""
    return setting.team.owns(number) and number // setting.team.size >= done


def _flat(model: nn.Module, part: Part) -> Tensor:
    return model.get_parameter(part.param).detach().flatten()[part.start : part.stop]


def _per_image(
    model: nn.Module, parts: Sequence[Part], stream: Iterator[tuple[Tensor, Tensor]], setting: ScoreConfig
) -> Iterator[Chunk]:
    owners = {part.param: model.get_submodule(part.param.rpartition(".")[0]) for part in parts}
    plain = [param for param, owner in owners.items() if param.endswith(".weight") and layer_io.plain(owner)]
    others = [part for part in parts if part.param not in plain]
    for images, labels in stream:
        calls = _run(model, {param: owners[param] for param in plain}, images, labels)
        for part in parts:
            if part.param in plain:
                found = [_products(owners[part.param], part, len(images), *call) for call in calls[part.param]]
                yield part, torch.stack(found).sum(dim=0) if len(found) > 1 else found[0]
        if others:
            ones = zip(images[:, None], labels[:, None], strict=True)
            yield from _stacked([_slopes(model, others, image, label) for image, label in ones])


def _run(model: nn.Module, layers: dict[str, nn.Module], images: Tensor, labels: Tensor) -> dict[str, Calls]:
    """What every layer read, and the gradients of each image's own loss by what it gave."""
    calls: dict[str, Calls] = {param: [] for param in layers}

    def hook(param: str) -> Any:
        def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept = output if output.requires_grad else output.detach().requires_grad_()  # here gradients may end
            calls[param].append((given[0].detach(), kept))
            return kept

        return keep

    handles = [layer.register_forward_hook(hook(param)) for param, layer in layers.items()]
    try:
        with torch.enable_grad():
            loss = cross_entropy(model(images), labels) * len(images) if layers else None
    finally:
        for handle in handles:
            handle.remove()
    if loss is None:
        return calls
    _refuse_unused(calls, [param for param, found in calls.items() if found])
    ends = [(param, read, output) for param, found in calls.items() for read, output in found]
    slopes = torch.autograd.grad(loss, [output for *_, output in ends], allow_unused=True)
    used: dict[str, Calls] = {}
    for (param, read, _), slope in zip(ends, slopes, strict=True):
        if slope is not None:
            used.setdefault(param, []).append((read, slope))
    _refuse_unused(calls, used)
    return used


def _products(layer: nn.Module, part: Part, images: int, read: Tensor, slope: Tensor) -> Tensor:
    """Gradients by a part of a layer's weight, image by image, from one call; (images, weights)."""
    read, slope = layer_io.layer_inputs(layer, read, images), layer_io.layer_outputs(layer, slope, images)
    width = read.shape[-1]
    first, last = part.start // width, -(-part.stop // width)  # rows of the weight that the part touches
    rows = slope[..., first:last].transpose(1, 2) @ read
    return rows.flatten(1)[:, part.start - first * width : part.stop - first * width]


def _per_batch(
    model: nn.Module, parts: Sequence[Part], stream: Iterator[tuple[Tensor, Tensor]], setting: ScoreConfig, done: int
) -> Iterator[Chunk]:
    held: list[dict[Part, Tensor]] = []
    room, number = 0, -1
    for images, labels in stream:
        while len(images):
            if not room:
                room, number = setting.gradient_batch, number + 1
                if len(held) == HELD:
                    yield from _stacked(held)
                if _left(setting, number, done * HELD):
                    held.append({part: torch.zeros_like(_flat(model, part)) for part in parts})
            taken = min(room, len(images))
            if _left(setting, number, done * HELD):
                for part, slope in _slopes(model, parts, images[:taken], labels[:taken]).items():
                    held[-1][part] += slope * (taken / setting.gradient_batch)
            room, images, labels = room - taken, images[taken:], labels[taken:]
    yield from _stacked(held)


def _stacked(held: list[dict[Part, Tensor]]) -> Iterator[Chunk]:
    for part in held[0] if held else ():
        yield part, torch.stack([slopes[part] for slopes in held])
    held.clear()


def _slopes(model: nn.Module, parts: Sequence[Part], images: Tensor, labels: Tensor) -> dict[Part, Tensor]:
    """The gradient of the mean loss of some images; (weights,) by part."""
    named = {part.param: model.get_parameter(part.param).detach().requires_grad_() for part in parts}
    with torch.enable_grad():
        loss = cross_entropy(functional_call(model, named, images), labels)
    ends = list(named.values())
    slopes = torch.autograd.grad(loss, ends, allow_unused=True) if loss.requires_grad else [None] * len(ends)
    found = {param: slope for param, slope in zip(named, slopes, strict=True) if slope is not None}
    _refuse_unused(named, found)
    return {part: found[part.param].flatten()[part.start : part.stop] for part in parts}


def _refuse_unused(wanted: Iterable[str], found: Container[str]) -> None:
    unused = [param for param in wanted if param not in found]
    if unused:
        raise BadInput(f"{unused[0]}: takes no part in the answer, so it has no gradient; leave it out")


def images_of(
    batches: Batches, number: int, seed: int, owns: Callable[[int], bool] = lambda batch: True
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many images with labels, in batches: first all as they are, then again and again in random views.

    Of them only the batches whose number is `mine`, counted over all turns.

    Raises:
        BadInput: more are wanted than there are, and they are no images that could be cropped.
    """
    given, place = 0, 0
    while given < number:
        for images, labels in batches:
            taken, first = images[: number - given], place < len(batches)
            if owns(place) and len(taken):
                generator = torch.Generator().manual_seed(seed * ONE_SEED + place)
                yield (taken if first else viewed(taken, generator)), labels[: len(taken)]
            given, place = given + len(taken), place + 1


def viewed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image cropped to a random part (8 to 100 % of its area) and resized, in half of all cases mirrored.

    images (B, C, H, W) as the model reads them.

    Raises:
        BadInput: they have another shape.

    Source: timm's RandomResizedCrop, which CAP's gradients are taken through.
    """
    if images.dim() != 4:
        raise BadInput(f"score.gradients: inputs of shape {list(images.shape[1:])} have no crops; ask for fewer")
    return torch.stack([_view(image, generator) for image in images])


def _view(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[1:]
    area, ratio, down, right, side = torch.rand(5, generator=generator).tolist()
    share = (AREA[0] + area * (AREA[1] - AREA[0])) * height * width
    aspect = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
    h, w = (min(most, max(1, round((share * by) ** 0.5))) for most, by in ((height, 1 / aspect), (width, aspect)))
    top, left = round(down * (height - h)), round(right * (width - w))
    part = image[None, :, top : top + h, left : left + w]
    whole = F.interpolate(part, (height, width), mode="bicubic", antialias=True)[0]
    return whole.flip(2) if side < 0.5 else whole
