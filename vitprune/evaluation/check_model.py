"""Proof that a timm model can be cut: removed by hand and cut out, its units leave the same function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprune import models
from vitprune.architectures import find_groups
from vitprune.data import example_input
from vitprune.errors import BadInput
from vitprune.evaluation.check_removal import RemovalCheck, check_removal
from vitprune.groups import KINDS, Group, Masks

RATIOS = (0.25, 0.5, 0.75)
CLASSES = 10  # of a model that has no classifier
SIDES = (64, 112, 128)  # of the images that a model is tried with, before those it was made for


@dataclass(frozen=True)
class ModelCheck:
    """A model, a kind of group and a ratio: proven, failed, or refused with the reason that the library gives."""

    model: str
    kind: str
    ratio: float
    verdict: str
    why: str
    groups: int = 0
    proof: RemovalCheck | None = None


def check(
    name: str, kinds: Sequence[str] = KINDS, ratios: Sequence[float] = RATIOS, args: dict[str, Any] | None = None
) -> Iterator[ModelCheck]:
    """Prove every kind and ratio on a timm model with random weights; `args` are those of timm.create_model.

    Raises:
        BadInput: timm cannot create the model, or a kind or ratio is unknown.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise BadInput(f"--ratios {ratio}: must be above 0 and below 1 (the share of units to remove)")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadInput(f"--kinds {unknown[0]!r}: unknown; use some of {', '.join(KINDS)}")
    dense, inputs = make_test_model(name, args)
    for kind in kinds:
        try:
            groups = find_groups(dense, [kind])
        except BadInput as refused:
            yield ModelCheck(name, kind, 0.0, "refused", str(refused))
            continue
        if kind == "block" and groups[0].units == 2:
            yield ModelCheck(name, kind, 0.0, "refused", f"{type(dense).__name__}: it has one block, which stays")
            continue
        for number, ratio in enumerate(ratios):
            proof = check_removal(dense, groups, random_odd_masks(groups, ratio, seed=number), inputs)
            verdict = "failed" if proof.faults else "proven"
            yield ModelCheck(name, kind, ratio, verdict, "; ".join(proof.faults), len(groups), proof)


def make_test_model(name: str, args: dict[str, Any] | None = None) -> tuple[nn.Module, Tensor]:
    """A timm model in float64 whose weights all matter, and two images (2, C, H, W): small ones where it takes them.

    Raises:
        BadInput: timm cannot create the model.
    """
    given = dict(args or {})
    model: Any = models.create(name, given)
    if model.num_classes == 0:  # its answer would be the residual stream, whose width may change
        given |= {"num_classes": CLASSES}
        model = models.create(name, given)
    channels, *sizes = example_input(model, 1).shape[1:]
    if "img_size" in given:
        return randomize_parameters(model), _noise(2, channels, given["img_size"], given["img_size"])
    trials = [] if max(sizes) <= SIDES[0] else [(side, side) for side in SIDES]
    for size in trials:
        images = torch.zeros(1, channels, *size)
        for more in ({}, {"img_size": size[0]}):
            try:
                smaller = models.create(name, given | more)
                with torch.no_grad():
                    smaller.eval()(images)
            except Exception:  # whatever it is that a model says to a size that it was not made for
                continue
            return randomize_parameters(smaller), _noise(2, channels, *size)
    return randomize_parameters(model), _noise(2, channels, *sizes)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def randomize_parameters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and statistic anew, in float64: what timm starts at zero or one would hide its units."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = parameter.dim() < 2 and name.endswith("weight") and not isinstance(owner, nn.Linear | nn.Conv2d)
        fan_in = max(1, parameter.numel() // max(1, parameter.shape[0])) if parameter.dim() > 1 else 100
        parameter.copy_(noise / fan_in**0.5 + float(scale))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def random_odd_masks(groups: Sequence[Group], ratio: float, seed: int = 0) -> Masks:
    """Random masks that remove about `ratio` of each group's units and leave an odd number of them (of each head)."""
    generator = torch.Generator().manual_seed(seed)
    masks: Masks = {}
    for group in groups:
        row = {"block": group.units // 2, "weight": group.units}.get(group.kind, group.shape[-1])
        kept = max(1, row - max(1, round(ratio * row)))
        order = torch.rand((group.units // row, row), generator=generator).argsort(1)
        if group.kind == "block":  # attention and FFN of a block go together
            masks[group.name] = (order[0] < kept).repeat_interleave(2)
        else:
            kept -= kept % 2 == 0
            masks[group.name] = (order < kept).view(group.shape)
    return masks
