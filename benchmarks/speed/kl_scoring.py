"""Speed of exact KL scoring of DeiT-Tiny: `kl-exact` against removing units one by one, as UP-ViTs' code does.

Leave-one-out removes the unit, runs the model and the pruned model and compares them; `kl-exact` scores the same units
on the same images. Milliseconds per unit and image, measured alternately in one process. The forward pass of the dense
model that `kl-exact` needs once per image is divided among all units; a time below the spread of that forward pass is
noise and has no ratio. Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/kl_scoring.json and
docs/results/kl_scoring.md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.lib.deit_tiny import load_dense, load_images
from benchmarks.lib.kl_rescoring import KINDS, rescoring_rows
from benchmarks.lib.results import Row, arguments, real_data, write_results, write_table
from vitprune import find_groups
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.kl.exact import kl_divergences
from vitprune.criteria.kl.leave_one_out import copy_without_unit
from vitprune.groups import Group
from vitprune.runtime.eval_mode import eval_mode

ROOT = Path(__file__).parents[2]
COMPONENTS = ("ffn", "attention", "head", "residual")
TARGET = 10.0
NOISE = 1e-7  # nats per image: below it float32 logits do not agree in the first digits


@dataclass(frozen=True)
class Case:
    """Model, images, and the number of timed units per group for each side."""

    model: nn.Module
    images: Tensor
    exact: int
    literal: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds per unit and image of one group, and the median relative difference of the divergences.

    `noise` is the spread of the forward pass's time in the same unit: a smaller `exact` is not a measurement.
    """

    group: Group
    literal: float
    exact: float
    noise: float
    apart: float

    @property
    def cells(self) -> list[str]:
        """Milliseconds of both sides and their ratio, which is left out where one is noise."""
        if self.exact <= self.noise:
            return [f"{self.literal:.1f}", f"< {max(self.noise, 0.01):.2f}", "-"]
        return [f"{self.literal:.1f}", f"{self.exact:.2f}", f"{self.literal / self.exact:.1f}x"]


def main() -> None:
    """Measure all scorers and write the tables."""
    quick = arguments(__doc__).quick
    folder = real_data()
    model = load_dense(folder)
    images = load_images(folder / "imagenet-val-800.parquet", model)[0][600 : 604 if quick else 664]
    case = Case(model, images, exact=4 if quick else 8, literal=1)
    timings = exact_timings(case)
    if not quick:
        write_table(
            ROOT / "docs/results/kl_scoring.md",
            "KL scoring of DeiT-Tiny",
            __doc__ or "",
            ["component", "block", "literal, ms", "exact, ms", "ratio"],
            exact_table(timings),
        )
    literal, exact = ({kind: component(timings, kind)[side] for kind in KINDS} for side in (0, 1))
    rescoring = [] if quick else rescoring_rows(model, images, literal, exact, pool=96)
    write_results("kl_scoring", exact_rows(timings, quick) + rescoring, quick)


def exact_timings(case: Case) -> list[Timing]:
    """Time both sides on a sample of units of every group."""
    groups = [group for kind in COMPONENTS for group in find_groups(case.model, [kind])]
    units = sum(group.units for group in groups)
    forward = [exact_run(case, groups[0], torch.empty(0, dtype=torch.int64))[0] for _ in range(3)]
    return [timing(case, group, forward, units) for group in groups]


def timing(case: Case, group: Group, forward: Sequence[float], units: int) -> Timing:
    """Time one group: leave-one-out on the first of the units, in random order.

    Args:
        case: Model, images and numbers of units.
        group: The group.
        forward: Seconds of a forward pass without scores, several times.
        units: Units of all groups.
    """
    once = min(forward)
    chosen = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
    count = case.exact
    seconds, result = exact_run(case, group, chosen[:count])
    while (
        seconds < 2 * once and count < group.units
    ):  # the time of a few units is smaller than that of the forward pass
        count = min(4 * count, group.units)
        seconds, result = exact_run(case, group, chosen[:count])
    exact, noise = (seconds - once) / count + once / units, (max(forward) - once) / count
    start = time.perf_counter()
    expected = torch.stack([literal_run(case, group, int(unit)) for unit in chosen[: case.literal]])
    literal = (time.perf_counter() - start) / len(expected)
    far = (result[: len(expected)] - expected).abs() / expected.clamp(min=NOISE)
    per_image = 1e3 / len(case.images)
    return Timing(group, per_image * literal, per_image * exact, per_image * noise, float(far.median()))


def exact_run(case: Case, group: Group, chosen: Tensor) -> tuple[float, Tensor]:
    """Return seconds and divergences of `kl_divergences`."""
    start = time.perf_counter()
    result = kl_divergences(case.model, [group], {group.name: chosen}, case.images, DEFAULT_CONTEXT)[group.name]
    return time.perf_counter() - start, result


@torch.no_grad()
def literal_run(case: Case, group: Group, unit: int) -> Tensor:
    """Return the divergences of one unit as in the authors' code; (images,)."""
    with eval_mode(case.model):
        pruned = copy_without_unit(case.model, group, unit)
        dense, changed = (run(case.images).double().log_softmax(-1) for run in (case.model, pruned))
    return (dense.exp() * (dense - changed)).sum(-1)


def component(timings: Sequence[Timing], kind: str) -> tuple[float, float]:
    """Return the mean milliseconds of a component, leave-one-out and exact."""
    same = [timing for timing in timings if timing.group.kind == kind]
    return mean(timing.literal for timing in same), mean(timing.exact for timing in same)


def exact_rows(timings: Sequence[Timing], quick: bool) -> list[Row]:
    """Return ratios per component, their average, the agreement of both sides, and the total time."""
    ratios = {}
    rows = []
    for kind in COMPONENTS:
        literal, exact = component(timings, kind)
        ratios[kind] = literal / exact
        rows += [Row(f"literal, {kind}", literal, "ms"), Row(f"exact, {kind}", exact, "ms")]
        rows.append(Row(f"literal / exact, {kind}", ratios[kind], "x"))
    average = mean(ratios.values())
    promise = (None, None) if quick else (f">= {TARGET:g}", average >= TARGET)
    rows.append(Row("literal / exact, average of components", average, "x", *promise))
    sums = [sum(getattr(t, side) * t.group.units for t in timings) for side in ("literal", "exact")]
    rows.append(Row("literal / exact, all units", sums[0] / sums[1], "x"))
    apart = max(timing.apart for timing in timings)
    return [*rows, Row("largest median difference of a group", apart, "of the score", "<= 0.05", apart <= 0.05)]


def exact_table(timings: Sequence[Timing]) -> list[list[str]]:
    """Return one line per component and block, and one per component."""
    lines = []
    for kind in COMPONENTS:
        same = [timing for timing in timings if timing.group.kind == kind]
        lines += [[kind, t.group.name.split(".")[1], *t.cells] for t in same if kind != "residual"]
        literal, exact = component(timings, kind)
        lines.append([kind, "all", f"{literal:.1f}", f"{exact:.2f}", f"{literal / exact:.1f}x"])
    return lines


if __name__ == "__main__":
    main()
