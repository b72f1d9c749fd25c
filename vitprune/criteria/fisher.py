"""UP-ViTs' criterion to second order: all units of all kinds from a few backward passes per image."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, Setting
from vitprune.criteria.gates import Gate, gates_of, watching
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.modes import evaluating, frozen
from vitprune.progress import track


def fisher(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: Setting) -> Importance:
    """Score a unit by 1/2 sum over images and classes of p_c (d log p_c / d gate of the unit)^2.

    The second-order expansion of KL(model || model without the unit) in a gate that closes. `setting.classes` gradients
    are taken per image: half of them of the likeliest classes one by one, half of all other classes at once, each with
    a sign drawn for it, which makes no bias. Where they are as many as the classes, each class has its own.

    Raises:
        BadInput: no batches, or a module at which the effect of a removal is not understood.

    Source: UP-ViTs equation 1, expanded; the Fisher information of gates as in Theis et al. 2018.
    """
    if not batches:
        raise BadInput("kl-fisher: needs images; give batches")
    scores = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    first = setting.first
    for images, _ in track(batches, "taking gradients of answers"):
        for name, value in per_image(model, groups, images, setting, first).items():
            scores[name] += value.sum(dim=1)
        first += len(images)
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def per_image(
    model: nn.Module, groups: Sequence[Group], images: Tensor, setting: Setting, first: int = 0
) -> dict[str, Tensor]:
    """The same score image by image: group name -> (units, B) float64 on the CPU.

    `first` is the position of the first image among all, which decides the signs that are drawn.
    """
    gates = gates_of(model, groups)
    device = next(model.parameters()).device
    images = images.detach().to(device)
    with evaluating(model), frozen(model), torch.enable_grad():
        size = max(1, min(len(images), setting.memory // _bytes_of_one(model, gates, images[:1], setting)))
        starts = range(0, len(images), size)
        pieces = [_scored(model, gates, images[n : n + size], setting, first + n) for n in starts]
    return {group.name: torch.cat([piece[group.name] for piece in pieces], dim=1) for group in groups}


def _scored(model: nn.Module, gates: Sequence[Gate], images: Tensor, setting: Setting, first: int) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    with watching(model, gates, len(images)) as tape:
        logits = _forward(model, images, setting)
        probability = logits.detach().double().softmax(dim=-1)  # (B, ..., classes)
        for pull in pulls(probability, setting, first):
            for name, slope in tape.derivatives(logits, pull.to(logits.dtype), gates).items():
                half = slope.double().square() / 2  # (B, units)
                total[name] = total[name] + half if name in total else half
    return {name: value.T.cpu() for name, value in total.items()}


def _forward(model: nn.Module, images: Tensor, setting: Setting) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=setting.autocast):
        logits: Tensor = model(images)
    return logits


def pulls(probability: Tensor, setting: Setting, first: int) -> Iterator[Tensor]:
    """Directions of the logits, each (B, ..., classes), whose outer products sum to the Fisher matrix on average.

    Of one class that is sqrt(p_c) (e_c - p), of the others together the sum of theirs with random signs. Where an image
    has several answers (one per token), each answer has a random sign too.
    """
    classes = probability.shape[-1]
    own = classes if setting.classes >= classes else (setting.classes + 1) // 2
    signs = _signs(probability, setting, first)
    top = probability.topk(own, dim=-1).indices
    for place in range(own):
        chosen = top[..., place : place + 1]
        taken = torch.zeros_like(probability).scatter(-1, chosen, probability.gather(-1, chosen).sqrt())
        yield _centred(taken if probability.dim() == 2 else taken * next(signs)[..., :1], probability)
    bundles = 0 if own == classes else max(1, setting.classes - own)
    for _ in range(bundles):
        rest = (probability / bundles).sqrt().scatter(-1, top, 0)
        yield _centred(rest * next(signs), probability)


def _centred(taken: Tensor, probability: Tensor) -> Tensor:
    return taken - probability * taken.sum(dim=-1, keepdim=True)


def _signs(probability: Tensor, setting: Setting, first: int) -> Iterator[Tensor]:
    """Random signs of the shape of the probabilities; an image's depend on the seed and its position alone."""
    sources = [np.random.default_rng([setting.seed, first + image]) for image in range(len(probability))]
    while True:
        drawn = [source.integers(2, size=probability.shape[1:], dtype=np.int8) for source in sources]
        yield torch.from_numpy(np.stack(drawn)).to(probability) * 2 - 1


def _bytes_of_one(model: nn.Module, gates: Sequence[Gate], image: Tensor, setting: Setting) -> int:
    """What one image's forward pass keeps for its backward passes, in bytes, the weights not counted."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), watching(model, gates, 1):
        _forward(model, image, setting)
    return max(1, sum(kept.values()))
