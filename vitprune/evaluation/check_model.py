"""Check on random weights that vitprune prunes a timm model correctly, for every kind of unit (`vitprune check`)."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from vitprune import models
from vitprune.architectures import find_groups, traced_groups
from vitprune.architectures.traced_groups import left_out
from vitprune.config.prune_config import KINDS
from vitprune.config.quantity import format_cost
from vitprune.data import example_input
from vitprune.errors import BadInput
from vitprune.evaluation.check_removal import RemovalCheck, check_removal
from vitprune.groups import Group, Masks
from vitprune.models.named_models import create_named, is_other_library
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.input_size import input_size
from vitprune.runtime.random_parameters import randomize_parameters

RATIOS = (0.25, 0.5, 0.75)
CLASSES = 10  # given to models without a classifier
SIDES = (64, 112, 128)  # image sizes to try before the default one, for speed


@dataclass(frozen=True)
class ModelCheck:
    """Result of one kind and ratio on one model.

    Attributes:
        model: Name of the model.
        kind: Kind of unit.
        ratio: Share of the units that are removed.
        verdict: "proven", "failed", or "refused" for a kind that the model does not support.
        why: Failures, or the reason of the refusal.
        groups: Number of groups.
        sizes: Attributes that change with the units, found by trial and proof.
        left_out: Modules whose units cannot be pruned, with the reason.
        seconds: CPU time to find the groups.
        proof: Details of the check; None for a refusal.
        image_size: Height and width of the images, for which the MACs are counted.
    """

    model: str
    kind: str
    ratio: float
    verdict: str
    why: str
    groups: int = 0
    proof: RemovalCheck | None = None
    image_size: tuple[int, int] = (0, 0)
    sizes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@check_arguments()
def check(
    name: str, kinds: Sequence[str] = KINDS, ratios: Sequence[float] = RATIOS, args: dict[str, Any] | None = None
) -> Iterator[ModelCheck]:
    """Verify the pruning of a model with random weights, for every kind of units and every fraction of removed units.

    Args:
        name: Model name of timm, hf:DIRECTORY_OR_CONFIG, torchvision:NAME or module:PACKAGE.FILE:CALLABLE.
        kinds: Kinds of units.
        ratios: Fractions of the units to remove, above 0 and below 1.
        args: Arguments of timm.create_model.

    Yields:
        One result per kind and ratio.

    Raises:
        BadInput: the model cannot be created, or a kind or ratio is unknown.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise BadInput(f"--ratios {ratio}: must be above 0 and below 1 (the share of units to remove)")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadInput(f"--kinds {unknown[0]!r}: unknown; use some of {', '.join(KINDS)}")
    dense, inputs = make_test_model(name, args)
    for kind in kinds:
        start = time.process_time()
        try:
            groups = _removable_groups(dense, kind)
        except BadInput as error:
            yield ModelCheck(name, kind, 0.0, "refused", str(error))
            continue
        seconds = round(time.process_time() - start, 3)
        for number, ratio in enumerate(ratios):
            result = check_removal(dense, groups, random_odd_masks(groups, ratio, seed=number), inputs)
            verdict = "failed" if result.failures else "proven"
            why, size = "; ".join(result.failures), (inputs.shape[2], inputs.shape[3])
            others = left_out(dense, kind)
            sizes = traced_groups.size_attributes_of(groups)
            yield ModelCheck(name, kind, ratio, verdict, why, len(groups), result, size, sizes, others, seconds)


def _removable_groups(model: nn.Module, kind: str) -> list[Group]:
    groups = find_groups(model, [kind])
    if groups[0].units == {"block": 2, "branch": 1}.get(kind, 0):
        raise BadInput(f"{type(model).__name__}: it has only one {kind}, which cannot be removed")
    if all(group.units == 1 for group in groups):
        raise BadInput(f"{groups[0].name}: no group of kind {kind!r} has more than one unit, which cannot be removed")
    return groups


def make_test_model(name: str, args: dict[str, Any] | None = None) -> tuple[nn.Module, Tensor]:
    """Create a model with random float64 weights and a batch of two images, small ones if a timm model takes them.

    Args:
        name: Model name of timm, or a name of `create_named`.
        args: Arguments of timm.create_model.

    Returns:
        The model, and images (2, C, H, W).

    Raises:
        BadInput: the model cannot be created.
    """
    if is_other_library(name):
        other = create_named(name)
        return randomize_parameters(other), _noise(2, *input_size(other))
    name, arguments = name.removeprefix("timm:"), dict(args or {})
    model: Any = models.create(name, arguments, key="model")
    if model.num_classes == 0:  # without a classifier the output is the residual stream, whose width changes
        arguments |= {"num_classes": CLASSES}
        model = models.create(name, arguments, key="model")
    channels, *sizes = example_input(model, 1).shape[1:]
    if "img_size" in arguments:
        return randomize_parameters(model), _noise(2, channels, *sizes)
    trials = [] if max(sizes) <= SIDES[0] else [(side, side) for side in SIDES]
    for size in trials:
        images = torch.zeros(1, channels, *size)
        for more in ({}, {"img_size": size[0]}):
            try:
                smaller = models.create(name, arguments | more, key="model")
                with torch.no_grad():
                    smaller.eval()(images)
            except Exception:  # models raise various errors for an unsupported size
                continue
            return randomize_parameters(smaller), _noise(2, channels, *size)
    return randomize_parameters(model), _noise(2, channels, *sizes)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random_odd_masks(groups: Sequence[Group], ratio: float, seed: int = 0) -> Masks:
    """Draw random masks that keep an odd number of units of each group, or of each head.

    Args:
        groups: Groups of one model.
        ratio: Approximate share of units to remove.
        seed: Seed of the draw.

    Returns:
        Masks by group name, True = kept.
    """
    generator = torch.Generator().manual_seed(seed)
    masks: Masks = {}
    for group in groups:
        row = {"block": group.units // 2, "weight": group.units}.get(group.kind, group.shape[-1])
        kept = max(1, row - max(1, round(ratio * row)))
        order = torch.rand((group.units // row, row), generator=generator).argsort(1)
        if group.kind == "block":  # attention and MLP of a block are removed together
            masks[group.name] = (order[0] < kept).repeat_interleave(2)
        else:
            kept -= kept % 2 == 0
            masks[group.name] = (order < kept).view(group.shape)
    return masks


def print_check(name: str, kinds: Sequence[str] | None, ratios: Sequence[float], as_json: bool) -> bool:
    """Print the results of `check` as a table, or as one JSON object per line; return whether no kind failed.

    Args:
        name: Name of the model, see `check`.
        kinds: Kinds of units; None: all.
        ratios: Fractions of the units to remove.
        as_json: Print JSON.
    """
    if as_json:
        verdicts = set()
        for row in check(name, kinds or KINDS, ratios):
            print(json.dumps(asdict(row)), flush=True)
            verdicts.add(row.verdict)
        return "failed" not in verdicts
    table = Table("kind", "removed", "verdict", "difference", "parameters", "MACs", box=None, pad_edge=False)
    console, reasons, failed = Console(), [], False
    with Live(table, console=console, transient=True) if console.is_terminal else nullcontext():
        for row in check(name, kinds or KINDS, ratios):
            failed |= row.verdict == "failed"
            if row.proof is not None:
                table.columns[-1].header = "MACs of {} x {} pixels".format(*row.image_size)
            table.add_row(row.kind, f"{row.ratio:.0%}" if row.ratio else "", row.verdict, *_cells(row.proof))
            reasons += [f"{row.kind}: {row.why}"] if row.why else []
            if row.ratio == ratios[0]:
                sizes = f"changes {', '.join(row.sizes)}, " if row.sizes else ""
                reasons += [f"{row.kind}: {row.groups} groups, {sizes}found in {row.seconds:.1f} s"]
                reasons += [f"{row.kind}: left out: {why}" for why in _distinct(row.left_out.values())]
    console.print(table)
    for reason in reasons:
        console.print(f"[dim]{escape(reason)}", highlight=False)
    return not failed


def _distinct(reasons: Iterable[str]) -> list[str]:
    """Return one of the reasons that differ only in numbers, as for equal blocks, with the number of others."""
    alike: dict[str, list[str]] = {}
    for why in reasons:
        alike.setdefault(re.sub(r"\d+", "0", why), []).append(why)
    return [why + (f" (and {len(others)} like it)" if others else "") for why, *others in alike.values()]


def _cells(proof: RemovalCheck | None) -> list[str]:
    """Return the largest difference, and parameters and MACs before and after."""
    if proof is None:
        return []
    pairs = [(proof.params_before, proof.params_after), (proof.macs_before, proof.macs_after)]
    return [f"{proof.difference:.1e}", *(f"{format_cost(before)} -> {format_cost(after)}" for before, after in pairs)]
