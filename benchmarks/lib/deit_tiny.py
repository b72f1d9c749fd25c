"""One-shot cuts of DeiT-Tiny without any training: what goes, by which method, and the top-1 that is left.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; every figure on the same images.
"""

import copy
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.results import Row, real_data
from vitprune import PruneConfig, ScoreConfig, data, find_groups, models, plan_for
from vitprune.criteria import DEFAULT_CONTEXT, DEFAULT_SCORE_CONFIG, Importance
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.groups import shrink
from vitprune.pruning.cycle_masks import cycle_state, groups_for, select_cycle_masks
from vitprune.pruning.methods import method_named
from vitprune.pruning.norm_correction import correct_norms
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import prune_cycles

Batches = Sequence[tuple[Tensor, Tensor]]
SECOND_ORDER = ScoreConfig(memory_mb=4096)  # room for half of the Fisher blocks of DeiT-Tiny


@dataclass(frozen=True)
class Goal:
    """What goes: shares of kinds, or all but a fraction of the MACs, or N:M; what is wanted of the best row, top-1 %.

    Only what is `deep` is also cut in steps.
    """

    name: str
    removed: Mapping[str, float] | None = None
    macs: float | None = None
    pattern: str | None = None
    wanted: float | None = None
    deep: bool = False

    @property
    def kinds(self) -> list[str]:
        """Kinds that lose units."""
        return list(self.removed or {"ffn": 1, "attention": 1})


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method, who competes if not as its row says, and how it is cut.

    One set of scores is cut at every size. Without `refit` a method's update is left out.
    """

    method: str
    scope: str | None = None
    steps: int = 1
    correction: bool = False
    ours: bool = False
    refit: bool = True

    @property
    def label(self) -> str:
        """In words."""
        scope, steps = f", {self.scope}" if self.scope else "", " in steps" if self.steps > 1 else ""
        return self.method + scope + steps + ("" if self.refit else ", no refit")

    def config(self, goal: Goal) -> PruneConfig | None:
        """Settings for a goal; None if the method cannot prune the kinds of the goal."""
        row = method_named(self.method)
        if not set(goal.kinds) <= set(row.scopes) or (self.steps > 1 and not goal.deep):
            return None
        if goal.pattern:
            return PruneConfig(method=self.method, scope=goal.pattern) if row.free_scope else None
        if self.method == "n:m":
            return None
        macs = {"macs": goal.macs} if goal.macs is not None else None
        shares = goal.removed or dict.fromkeys(goal.kinds, 1.0)
        return PruneConfig(
            method=self.method,
            sparsity=shares,
            scope=self.scope,
            cycles=self.steps,
            schedule="linear",
            target=macs,
        )


@dataclass(frozen=True)
class Cut:
    """A pruned model's top-1 on evaluation images, before and after the correction, and its share of the cost."""

    entry: str
    goal: str
    ours: bool
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

    @property
    def top1(self) -> float:
        """Of the dense model on the evaluation images."""
        return accuracy(self.dense, self.held_out)[0]["top1"]


def measure(
    entries: Sequence[Entry], goals: Sequence[Goal], notes: Path, score: ScoreConfig = DEFAULT_SCORE_CONFIG
) -> dict[tuple[str, str], Cut]:
    """All cuts by the labels of entry and goal, each entry in one of two processes of one thread.

    `notes` takes a line per cut as it is made, and what is there already is not made again: delete it to begin anew.
    `score` has the options of the criteria.
    """
    done = [Cut(**json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    made = {(cut.entry, cut.goal) for cut in done}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for entry in entries:
            left = [goal for goal in goals if (entry.label, goal.name) not in made]
            jobs += [pool.submit(_cuts, entry, left, notes, score)] if left else []
        return {(cut.entry, cut.goal): cut for cut in [*done, *(cut for job in jobs for cut in job.result())]}


def damped(config: PruneConfig) -> Plan:
    """The plan of settings for second-order methods."""
    return plan_for(config, SECOND_ORDER)


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


def load_images(path: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All images of a Parquet file in its own order, as the model's evaluation transform gives them."""
    source = data.open_source(f"parquet:{path}")
    transform = data.transform(data.data_config(model))
    images = torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in source.ids])
    return images, torch.tensor(source.labels)


def corrected(case: Setup, model: nn.Module) -> nn.Module:
    """The model, its norms and biases moved towards the dense answers in place; what is zero stays so."""
    with torch.no_grad():
        for name, value in correct_norms(model, case.wanted, case.calibration, DEFAULT_CONTEXT).values.items():
            model.get_parameter(name).copy_(value)
    return model


def rows(done: Mapping[tuple[str, str], Cut], goals: Sequence[Goal], dense: float, promised: bool) -> list[Row]:
    """The figures for the results file: the best of ours beside what is wanted of it, where it is `promised`."""
    found = [Row("dense", dense, "top-1 %")]
    for aim in goals:
        own = [max(cut.top1, cut.corrected or 0.0) for cut in done.values() if cut.goal == aim.name and cut.ours]
        best = max(own, default=0.0)
        held = (f">= {aim.wanted:g}", best >= aim.wanted) if promised and aim.wanted is not None else (None, None)
        found.append(Row(f"best of ours, {aim.name}", best, "top-1 %", *held))
    for one in done.values():
        found.append(Row(f"{one.entry}, {one.goal}", one.top1, "top-1 %"))
        if one.corrected is not None:
            found.append(Row(f"{one.entry} + correction, {one.goal}", one.corrected, "top-1 %"))
        found.append(Row(f"{one.entry}, {one.goal}, what is left", one.macs, "of the MACs"))
    return found


def lines(done: Mapping[tuple[str, str], Cut], entries: Sequence[Entry], goals: Sequence[Goal]) -> list[list[str]]:
    """The table's lines, an entry and where it was corrected the same again; a dash for what cannot be."""
    found = []
    for entry in entries:
        for fixed in range(1 + entry.correction):
            cuts = [done.get((entry.label, aim.name)) for aim in goals]
            values = [None if cut is None else cut.corrected if fixed else cut.top1 for cut in cuts]
            cells = ["-" if value is None else f"{value:.1f}" for value in values]
            found.append([entry.label + " + correction" * fixed, *cells])
    return found


def _cuts(entry: Entry, goals: Sequence[Goal], notes: Path, score: ScoreConfig) -> list[Cut]:
    """One line of the table, noted cut by cut."""
    case = setup()
    configs = {goal.name: entry.config(goal) for goal in goals}
    plans = {name: plan_for(config, score) for name, config in configs.items() if config is not None}
    shared = [plan for plan in plans.values() if plan.context(1).pattern is None]
    found = _scored(case, shared) if shared and entry.steps == 1 else None
    cuts = []
    for name, plan in plans.items():
        cuts.append(_cut(case, entry, name, plan, found if plan in shared else None))
        with notes.open("a") as file:
            file.write(json.dumps(asdict(cuts[-1])) + "\n")
    return cuts


def _scored(case: Setup, plans: Sequence[Plan]) -> Importance:
    """Scores of all kinds that any of the plans needs, and what the update needs."""
    kinds = list(dict.fromkeys(kind for plan in plans for kind in plan.sparsity))
    return plans[0].method.criterion(case.dense, find_groups(case.dense, kinds), case.calibration, plans[0].context(0))


def _cut(case: Setup, entry: Entry, name: str, plan: Plan, found: Importance | None) -> Cut:
    """Prune for one goal, evaluate, correct, evaluate again."""
    model = copy.deepcopy(case.dense)
    first = _chosen(model, plan, found) if found else None
    if first and not entry.refit:
        shrink(model, groups_for(model, plan), first)
    else:
        for _ in prune_cycles(model, plan, case.calibration, first, dict(found.statistics) if found else None):
            pass
    before = accuracy(model, case.held_out)[0]["top1"]
    after = accuracy(corrected(case, model), case.held_out)[0]["top1"] if entry.correction else None
    example = case.held_out[0][0][:1]
    left = count(model, example).nonzero_macs / count(case.dense, example).macs
    done = Cut(entry.label, name, entry.ours, before, after, left)
    print(done, flush=True)
    return done


def _chosen(model: nn.Module, plan: Plan, importance: Importance) -> dict[str, Tensor]:
    """Masks of a plan of one cycle."""
    return dict(select_cycle_masks(model, importance.scores, plan, cycle_state(model, plan)).masks)
