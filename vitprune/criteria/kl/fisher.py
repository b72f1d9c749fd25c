"""UP-ViTs' criterion to second order: all units of all kinds from a few backward passes per image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, Importance, ScoreConfig
from vitprune.criteria.fisher_directions import fisher_directions
from vitprune.criteria.kl.gate_gradients import UnitGate, gates_of, watching
from vitprune.criteria.memory import images_at_once
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.runtime.eval_mode import evaluating, frozen
from vitprune.runtime.progress import track


def fisher_kl(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a unit by 1/2 sum over images and classes of p_c (d log p_c / d gate of the unit)^2.

    The second-order expansion of KL(model || model without the unit) in a gate that closes. `setting.classes` gradients
    are taken per image: half of them in the directions that matter most to its answer, half in random ones that stand
    for all others without bias. Where they are as many as the classes, each class has its own and the sum is exact.

    Raises:
        BadInput: no batches, or a module at which the effect of a removal is not understood.

    Source: UP-ViTs equation 1, expanded; the Fisher information of gates as in Theis et al. 2018.
    """
    if not batches:
        raise BadInput("kl-fisher: needs images; give batches")
    scores = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    first = setting.first
    for images, _ in track(batches, "taking gradients of answers"):
        for name, value in fisher_kl_per_image(
            model, groups, images, setting, range(first, first + len(images))
        ).items():
            scores[name] += value.sum(dim=1)
        first += len(images)
    for group in groups:
        scores[group.name][group.candidates :] = torch.inf  # the last sub-layer has no next one to go with
    return Importance({group.name: scores[group.name].view(group.shape) for group in groups})


def fisher_kl_per_image(
    model: nn.Module,
    groups: Sequence[Group],
    images: Tensor,
    setting: ScoreConfig,
    positions: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The same score image by image: group name -> (units, B) float64 on the CPU.

    `positions` are those of the images among all, which decide the signs that are drawn (by default from 0).
    """
    gates = gates_of(model, groups)
    device = next(model.parameters()).device
    images = images.detach().to(device)
    with evaluating(model), frozen(model), torch.enable_grad():
        with watching(model, gates, 1):
            size = images_at_once(model, lambda image: _forward(model, image, setting), images[:1], setting.memory)
        where = range(len(images)) if positions is None else positions
        starts = range(0, len(images), size)
        pieces = [_scored(model, gates, images[n : n + size], setting, where[n : n + size]) for n in starts]
    return {group.name: torch.cat([piece[group.name] for piece in pieces], dim=1) for group in groups}


def _scored(
    model: nn.Module, gates: Sequence[UnitGate], images: Tensor, setting: ScoreConfig, positions: Sequence[int]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    with watching(model, gates, len(images)) as tape:
        logits = _forward(model, images, setting)
        probability = logits.detach().double().softmax(dim=-1)  # (B, ..., classes)
        for pull in fisher_directions(probability, tape.head(logits), setting.classes, setting.seed, positions):
            for name, slope in tape.derivatives(logits, pull.to(logits.dtype), gates).items():
                half = slope.double().square() / 2  # (B, units)
                total[name] = total[name] + half if name in total else half
    return {name: value.T.cpu() for name, value in total.items()}


def _forward(model: nn.Module, images: Tensor, setting: ScoreConfig) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=setting.autocast):
        logits: Tensor = model(images)
    return logits
