"""One-shot structured pruning of DeiT-Tiny without any training: top-1 of every method where the same goes.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; every figure on the same images, so one
has a standard error of about 1.6 points. A method scores once; every size is cut from those scores. `in steps` cuts
in four cycles and scores again in each; `+ correction` moves norms and biases afterwards (prune.correct). MACs are
those of what is left. Torch-Pruning's line is its best set-up of benchmarks/peers.py, which has to run before.
Needs VITPRUNE_REAL_DATA. Writes benchmarks/results/structured.json and docs/results/structured.md.
"""

import copy
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, Row, arguments, real_data, write_results, write_table
from oneshot import load_images
from torch import Tensor, nn

from vitprune import find_groups, models, plan_for
from vitprune.choosing import choose, costs_for, goal, groups_for
from vitprune.compress import compress
from vitprune.criteria import DEFAULTS, Importance
from vitprune.criteria.correction import correct
from vitprune.evaluate import accuracy, count
from vitprune.groups import Scores
from vitprune.methods import method_named
from vitprune.plans import Plan

ROOT = Path(__file__).parent.parent
STEPS = 4
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Goal:
    """What goes: shares of kinds, or all but a fraction of the MACs; what is wanted of the best row, top-1 %.

    Only what is `deep` is also cut in steps.
    """

    name: str
    removed: Mapping[str, float] | None = None
    macs: float | None = None
    wanted: float | None = None
    deep: bool = False

    @property
    def kinds(self) -> list[str]:
        """Kinds that lose units."""
        return list(self.removed or {"ffn": 1, "attention": 1})


GOALS = (
    Goal("25 % of FFN", {"ffn": 0.25}, wanted=78.0),
    Goal("50 % of FFN", {"ffn": 0.5}, wanted=73.0),
    Goal("70 % of FFN", {"ffn": 0.7}, wanted=52.0, deep=True),
    Goal("25 % of attention", {"attention": 0.25}, wanted=79.8),
    Goal("50 % of attention", {"attention": 0.5}, wanted=75.0),
    Goal("10 % of residual", {"residual": 0.1}),
    Goal("0.85x MACs", macs=0.85),
    Goal("0.7x MACs", macs=0.7, wanted=77.5),
    Goal("0.5x MACs", macs=0.5, wanted=62.0, deep=True),
)


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method, who competes if not as its row says, and how it is cut."""

    method: str
    scope: str | None = None
    steps: int = 1
    correction: bool = False

    @property
    def label(self) -> str:
        """In words."""
        return self.method + (f", {self.scope}" if self.scope else "") + (" in steps" if self.steps > 1 else "")

    def plan(self, goal: Goal) -> Plan | None:
        """The plan for a goal; None where the method cannot lose what the goal names."""
        if not set(goal.kinds) <= set(method_named(self.method).scopes) or (self.steps > 1 and not goal.deep):
            return None
        macs = {"macs": goal.macs} if goal.macs is not None else None
        shares = goal.removed or dict.fromkeys(goal.kinds, 1.0)
        return plan_for(self.method, shares, self.scope, cycles=self.steps, schedule="linear", target=macs)


ENTRIES = (
    Entry("channel-magnitude"),
    Entry("channel-taylor"),
    Entry("channel-taylor", "global"),
    Entry("corp"),
    Entry("upvits-fisher"),
    Entry("upvits-refit"),
    Entry("upvits-global"),
    Entry("unit-obs", "layer"),
    Entry("unit-obs", correction=True),
    Entry("unit-obs", steps=STEPS, correction=True),
)


@dataclass(frozen=True)
class Cut:
    """A pruned model's top-1 on evaluation images, before and after the correction, and its share of the MACs."""

    entry: str
    goal: str
    top1: float
    corrected: float | None
    macs: float


@dataclass(frozen=True)
class Setup:
    """The dense model and its images."""

    dense: nn.Module
    calibration: Batches
    held_out: Batches
    wanted: list[Tensor]


def setup() -> Setup:
    """Read the model and the images; one thread, as two processes run."""
    torch.set_num_threads(1)
    folder = real_data()
    dense = models.create("deit_tiny_patch16_224", checkpoint=folder / "deit_tiny_patch16_224.safetensors").eval()
    images, labels = load_images(folder / "imagenet-val-800.parquet", dense)
    calibration = [(images[row : row + 50], labels[row : row + 50]) for row in range(600, 800, 50)]
    held_out = [(images[row : row + 100], labels[row : row + 100]) for row in range(0, 600, 100)]
    with torch.no_grad():
        return Setup(dense, calibration, held_out, [dense(batch) for batch, _ in calibration])


def cuts(entry: Entry, goals: Sequence[Goal]) -> list[Cut]:
    """One line of the table."""
    case = setup()
    plans = {goal.name: plan for goal in goals if (plan := entry.plan(goal)) is not None}
    found = scored(case, entry, list(plans.values())) if entry.steps == 1 else None
    return [cut(case, entry, name, plan, found) for name, plan in plans.items()]


def scored(case: Setup, entry: Entry, plans: Sequence[Plan]) -> Importance:
    """Scores of all kinds that any of the plans needs, and what the update needs."""
    kinds = list(dict.fromkeys(kind for plan in plans for kind in plan.sparsity))
    row = method_named(entry.method)
    return row.criterion(case.dense, find_groups(case.dense, kinds), case.calibration, DEFAULTS)


def cut(case: Setup, entry: Entry, name: str, plan: Plan, found: Importance | None) -> Cut:
    """Prune for one goal, evaluate, correct, evaluate again."""
    model = copy.deepcopy(case.dense)
    first = chosen(model, plan, found.scores) if found else None
    for _ in compress(model, plan, case.calibration, first, dict(found.statistics) if found else None):
        pass
    before = accuracy(model, case.held_out)[0]["top1"]
    after = corrected(case, model) if entry.correction else None
    example = case.held_out[0][0][:1]
    done = Cut(entry.label, name, before, after, count(model, example).macs / count(case.dense, example).macs)
    print(done, flush=True)
    return done


def corrected(case: Setup, model: nn.Module) -> float:
    """Top-1 after the correction, which is made in place."""
    moved = correct(model, case.wanted, case.calibration, DEFAULTS).values
    with torch.no_grad():
        for name, value in moved.items():
            model.get_parameter(name).copy_(value)
    return accuracy(model, case.held_out)[0]["top1"]


def chosen(model: nn.Module, plan: Plan, scores: Scores) -> dict[str, Tensor]:
    """Masks of a plan of one cycle."""
    groups = groups_for(model, plan)
    costs = costs_for(model, groups, plan)
    own = {group.name: scores[group.name] for group in groups}
    return choose(own, groups, plan, goal(own, groups, plan, 1, costs), costs=costs)


def main() -> None:
    """Measure every line and write the tables."""
    quick = arguments(__doc__).quick
    real_data()
    goals = [GOALS[1], GOALS[7]] if quick else list(GOALS)
    entries = [Entry("corp"), Entry("unit-obs")] if quick else sorted(ENTRIES, key=lambda entry: -entry.steps)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = {entry: pool.submit(cuts, entry, goals) for entry in entries}
        done = {(cut.entry, cut.goal): cut for entry in entries for cut in jobs[entry].result()}
    case = setup()
    dense = accuracy(case.dense, case.held_out)[0]["top1"]
    lines = [(entry.label, fixed) for entry in ENTRIES if entry in jobs for fixed in range(1 + entry.correction)]
    if not quick:
        write_table(
            ROOT / "docs/results/structured.md",
            "One-shot structured pruning of DeiT-Tiny, no training",
            __doc__ or "",
            ["method", *(goal.name for goal in goals)],
            [
                ["dense", *([f"{dense:.1f}"] * len(goals))],
                ["Torch-Pruning, its best", *peers(goals)],
                *([name + " + correction" * fixed, *cells(done, name, goals, fixed)] for name, fixed in lines),
            ],
        )
    rows = [Row("dense", dense, "top-1 %"), *(best(done, goal, quick) for goal in goals)]
    for one in done.values():
        rows.append(Row(f"{one.entry}, {one.goal}", one.top1, "top-1 %"))
        if one.corrected is not None:
            rows.append(Row(f"{one.entry} + correction, {one.goal}", one.corrected, "top-1 %"))
        rows.append(Row(f"{one.entry}, {one.goal}, what is left", one.macs, "of the MACs"))
    write_results("structured", rows, quick)


def cells(done: Mapping[tuple[str, str], Cut], name: str, goals: Sequence[Goal], fixed: int) -> list[str]:
    """A line's figures; a dash where the method cannot do it."""
    found = [done.get((name, goal.name)) for goal in goals]
    values = [None if cut is None else cut.corrected if fixed else cut.top1 for cut in found]
    return ["-" if value is None else f"{value:.1f}" for value in values]


def best(done: Mapping[tuple[str, str], Cut], goal: Goal, quick: bool) -> Row:
    """The best row of this library at a goal, beside what is wanted of it."""
    own = [cut for cut in done.values() if cut.goal == goal.name and cut.entry.startswith(("unit-obs", "upvits"))]
    top = max(max(cut.top1, cut.corrected or 0.0) for cut in own)
    if quick or goal.wanted is None:
        return Row(f"best of ours, {goal.name}", top, "top-1 %")
    return Row(f"best of ours, {goal.name}", top, "top-1 %", f">= {goal.wanted:g}", top >= goal.wanted)


def peers(goals: Sequence[Goal]) -> list[str]:
    """Torch-Pruning's best at the goals that its own benchmark has; a dash at the others."""
    path = RESULTS / "peers.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    found = []
    for aim in goals:
        named = f"{aim.macs:g}x MACs: " if aim.macs else f"{aim.name.replace(' %', '%').lower()}: "
        same = [row for row in rows if row["what"].startswith(named)]
        own = [row["value"] for row in same if not row["what"].endswith("calibration")]
        found.append(f"{max(own):.1f}" if own else "-")
    return found


if __name__ == "__main__":
    main()
