"""Widths found by a search on held-out images against the ranking alone: unit-obs on DeiT-Tiny, without labels.

Row `ranking` is unit-obs by score per MAC. Row `search` is prune.allocation: one factor per group (12 FFNs, 12
attentions), found by separable CMA-ES. Scores and weight updates of the search come from every second calibration
image; candidates are compared by the KL divergence from the dense model on the other images. The final masks are
computed from all images. Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; all values on the
same images. `nats` is the KL divergence from the dense model per evaluation image. `difference` is the top-1 minus that
of the ranking, on the same images, with its standard error. `+ correction`: norms and biases are corrected afterwards
(prune.correct_norms). Seconds are those of the pruning on one thread; scores of the same images are computed once.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/allocation.json and docs/results/allocation.md.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.deit_tiny import Setup, corrected, setup
from benchmarks.lib.results import Recorded, Row, arguments, write_results, write_table
from vitprune import METHODS, PruneConfig, count, plan_for
from vitprune.config.allocation_config import AllocationConfig
from vitprune.criteria import Batches, Importance, ScoringContext
from vitprune.evaluation.losses import kl_divergence
from vitprune.groups import Group
from vitprune.pruning.methods import method_named
from vitprune.pruning.prune_cycles import prune_cycles

ROOT = Path(__file__).parents[2]
METHOD = "unit-obs"


@dataclass(frozen=True)
class Searched:
    """A pruned model; `seed` -1 is the ranking alone. Top-1 in %, nats per image, without and with correction."""

    target: float
    seed: int
    evaluations: int
    macs: float
    seconds: float
    top1: tuple[float, float]
    nats: tuple[float, float]
    difference: tuple[float, float] = (0.0, 0.0)
    error: tuple[float, float] = (0.0, 0.0)


def main() -> None:
    """Prune for every target by the ranking and with a search, and write the tables."""
    extra = {"targets": ("0.7,0.5", "remaining MACs"), "seeds": ("0", "seeds"), "evaluations": (200, "per search")}
    options = arguments(__doc__, extra)
    case, done = setup(), Recorded("allocation", Searched, options.quick)
    share_statistics()
    evaluations = 30 if options.quick else options.evaluations
    for target in [float(text) for text in options.targets.split(",")]:
        baseline: list[Tensor] = []
        for seed in (-1, *(int(text) for text in options.seeds.split(","))):
            result, answers = measure(case, target, seed, evaluations, baseline)
            baseline = baseline or answers
            done.record(result)
    if not options.quick:
        header = [
            "MACs",
            "widths",
            "models",
            "top-1",
            "difference",
            "nats",
            "+ correction",
            "difference",
            "nats",
            "seconds",
        ]
        about = f"Dense: {case.top1:.1f} %. {__doc__}"
        title = "Widths by a search on held-out images"
        write_table(ROOT / "docs/results/allocation.md", title, about, header, [cells(result) for result in done])
    rows = [
        Row(f"{label(result)}{' + correction' * step}", value, unit)
        for result in done
        for step in (0, 1)
        for value, unit in ((result.top1[step], "top-1 %"), (result.nats[step], "nats per image"))
    ]
    write_results("allocation", rows, options.quick)


def share_statistics() -> None:
    """Compute the scores of one set of images once; the search and all rows then use them."""
    method, known = method_named(METHOD), dict[int, Importance]()

    def criterion(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
        images = sum(len(images) for images, _ in batches)
        if images not in known:
            known[images] = method.criterion(
                copy.deepcopy(model), groups, batches, context
            )  # the model is pruned later
        return known[images]

    METHODS[METHOD] = replace(method, criterion=criterion)


def measure(
    case: Setup, target: float, seed: int, evaluations: int, baseline: Sequence[Tensor]
) -> tuple[Searched, list[Tensor]]:
    """Prune and evaluate; return the result and, without and with correction, which answers are right."""
    allocation = AllocationConfig(evaluations=evaluations) if seed >= 0 else None
    plan = plan_for(PruneConfig(method=METHOD, target={"macs": target}, allocation=allocation), seed=max(seed, 0))
    model, start = copy.deepcopy(case.dense), time.perf_counter()
    (cycle,) = prune_cycles(model, plan, case.calibration)
    seconds, expected = time.perf_counter() - start, logits(case.dense, case.held_out)
    labels, image = torch.cat([labels for _, labels in case.held_out]), case.held_out[0][0][:1]
    outputs = [logits(model, case.held_out), logits(corrected(case, model), case.held_out)]
    right = [(output.argmax(dim=1) == labels).double() for output in outputs]
    changes = [after - before for after, before in zip(right, baseline or right, strict=True)]
    result = Searched(
        target,
        seed,
        int(cycle.allocation.get("evaluations", 1)),
        count(model, image).macs / count(case.dense, image).macs,
        seconds,
        (100 * float(right[0].mean()), 100 * float(right[1].mean())),
        (kl_divergence(outputs[0], expected), kl_divergence(outputs[1], expected)),
        (100 * float(changes[0].mean()), 100 * float(changes[1].mean())),
        (standard_error(changes[0]), standard_error(changes[1])),
    )
    return result, right


def standard_error(changes: Tensor) -> float:
    """Return the standard error of a mean, in %."""
    return 100 * float(changes.std()) / len(changes) ** 0.5


@torch.no_grad()
def logits(model: nn.Module, batches: Batches) -> Tensor:
    """Return the logits of all images."""
    return torch.cat([model(images) for images, _ in batches])


def label(result: Searched) -> str:
    """Return the label of a row."""
    return f"{result.target:g}, " + ("ranking" if result.seed < 0 else f"search, seed {result.seed}")


def cells(result: Searched) -> list[str]:
    """Return the cells of a row of the table."""
    steps = [
        [f"{top1:.1f}", f"{difference:+.1f} +- {error:.1f}" if result.seed >= 0 else "", f"{nats:.3f}"]
        for top1, difference, error, nats in zip(result.top1, result.difference, result.error, result.nats, strict=True)
    ]
    widths = label(result).partition(", ")[2]
    return [f"{result.macs:.4f}", widths, str(result.evaluations), *steps[0], *steps[1], f"{result.seconds:.0f}"]


if __name__ == "__main__":
    main()
