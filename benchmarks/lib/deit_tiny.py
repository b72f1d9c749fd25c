"""One-shot pruning of DeiT-Tiny without training: entries (method and settings), goals (cost or sparsity) and top-1.

Calibration on rows 600..799, evaluation on rows 0..599 of imagenet-val-800; all values on the same images.
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
from vitprune.pruning.apply_masks import copy_params
from vitprune.pruning.cycle_masks import cycle_state, groups_for, select_cycle_masks
from vitprune.pruning.methods import method_named
from vitprune.pruning.norm_correction import correct_norms
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune_cycles import prune_cycles

Batches = Sequence[tuple[Tensor, Tensor]]
SECOND_ORDER = ScoreConfig(memory_mb=4096)  # half of the Fisher blocks of DeiT-Tiny


@dataclass(frozen=True)
class Goal:
    """Sparsities per kind, remaining fraction of the MACs, or an N:M pattern.

    `bound` is the top-1 in % promised for the best row. Entries with several steps are measured
    only for goals that are `deep`.
    """

    name: str
    removed: Mapping[str, float] | None = None
    macs: float | None = None
    pattern: str | None = None
    bound: float | None = None
    deep: bool = False

    @property
    def kinds(self) -> list[str]:
        """Kinds of the pruned units."""
        return list(self.removed or {"ffn": 1, "attention": 1})


@dataclass(frozen=True)
class Entry:
    """A row of the table: method, scope (None: the default of the method), steps and correction.

    All goals use one set of scores. Without `refit` the method's update is not applied.
    """

    method: str
    scope: str | None = None
    steps: int = 1
    correction: bool = False
    ours: bool = False
    refit: bool = True

    @property
    def label(self) -> str:
        """Return the label."""
        scope, steps = f", {self.scope}" if self.scope else "", " in steps" if self.steps > 1 else ""
        return self.method + scope + steps + ("" if self.refit else ", no refit")

    def config(self, goal: Goal) -> PruneConfig | None:
        """Settings for a goal; None if the method cannot prune the kinds of the goal."""
        row = method_named(self.method)
        if not set(goal.kinds) <= set(row.scopes) or (self.steps > 1 and not goal.deep):
            return None
        if self.method == "unit-obs" and "residual" in goal.kinds:  # of a rotated stream only: residual_rotation.py
            return None
        if goal.pattern:
            return PruneConfig(method=self.method, scope=goal.pattern) if row.free_scope else None
        if self.method == "n:m":
            return None
        macs = {"macs": goal.macs} if goal.macs is not None else None
        shares = goal.removed or dict.fromkeys(goal.kinds, 1.0)
        return PruneConfig(
            method=self.method, sparsity=shares, scope=self.scope, cycles=self.steps, schedule="linear", target=macs
        )


@dataclass(frozen=True)
class PrunedResult:
    """Top-1 of a pruned model on evaluation images, before and after the correction, and its MACs relative to dense."""

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
    dense_logits: list[Tensor]

    @property
    def top1(self) -> float:
        """Top-1 of the dense model on the evaluation images."""
        return accuracy(self.dense, self.held_out)[0]["top1"]


def measure(
    entries: Sequence[Entry], goals: Sequence[Goal], notes: Path, score: ScoreConfig = DEFAULT_SCORE_CONFIG
) -> dict[tuple[str, str], PrunedResult]:
    """Return all results by the labels of entry and goal, computed in two processes of one thread.

    Each result is appended to `notes`, and results in that file are not computed again; delete it to start over.
    `score` has the options of the criteria.
    """
    done = [PrunedResult(**json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    recorded = {(result.entry, result.goal) for result in done}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for entry in entries:
            remaining = [goal for goal in goals if (entry.label, goal.name) not in recorded]
            jobs += [pool.submit(_measure_entry, entry, remaining, notes, score)] if remaining else []
        results = [*done, *(result for job in jobs for result in job.result())]
        return {(result.entry, result.goal): result for result in results}


def damped(config: PruneConfig) -> Plan:
    """Return the plan with the memory limit for second-order methods."""
    return plan_for(config, SECOND_ORDER)


def setup() -> Setup:
    """Read the model and the images; one thread, since two processes run."""
    torch.set_num_threads(1)
    folder = real_data()
    dense = load_dense(folder)
    calibration, held_out = split(*load_images(folder / "imagenet-val-800.parquet", dense))
    with torch.no_grad():
        return Setup(dense, calibration, held_out, [dense(batch) for batch, _ in calibration])


def load_dense(folder: Path) -> nn.Module:
    """Return the published DeiT-Tiny."""
    return models.create("deit_tiny_patch16_224", checkpoint=folder / "deit_tiny_patch16_224.safetensors").eval()


def split(images: Tensor, labels: Tensor) -> tuple[Batches, Batches]:
    """Return calibration batches (rows 600..799) and evaluation batches (rows 0..599) of the ImageNet sample."""
    calibration = [(images[row : row + 50], labels[row : row + 50]) for row in range(600, 800, 50)]
    return calibration, [(images[row : row + 100], labels[row : row + 100]) for row in range(0, 600, 100)]


def load_images(path: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return all images of a Parquet file in file order, after the model's evaluation transform."""
    source = data.open_source(f"parquet:{path}")
    transform = data.transform(data.data_config(model))
    images = torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in source.ids])
    return images, torch.tensor(source.labels)


def corrected(case: Setup, model: nn.Module) -> nn.Module:
    """Correct norms and biases in place towards the dense logits; zeros remain zero."""
    copy_params(model, correct_norms(model, case.dense_logits, case.calibration, DEFAULT_CONTEXT).values)
    return model


def rows(
    done: Mapping[tuple[str, str], PrunedResult], goals: Sequence[Goal], dense: float, promised: bool
) -> list[Row]:
    """Return the rows of the results file: the best of ours with its bound if `promised`, then all results."""
    result_rows = [Row("dense", dense, "top-1 %")]
    for goal in goals:
        ours = [max(r.top1, r.corrected or 0.0) for r in done.values() if r.goal == goal.name and r.ours]
        best = max(ours, default=0.0)
        bound = (f">= {goal.bound:g}", best >= goal.bound) if promised and goal.bound is not None else (None, None)
        result_rows.append(Row(f"best of ours, {goal.name}", best, "top-1 %", *bound))
    for result in done.values():
        result_rows.append(Row(f"{result.entry}, {result.goal}", result.top1, "top-1 %"))
        if result.corrected is not None:
            result_rows.append(Row(f"{result.entry} + correction, {result.goal}", result.corrected, "top-1 %"))
        result_rows.append(Row(f"{result.entry}, {result.goal}, remaining MACs", result.macs, "of the MACs"))
    return result_rows


def lines(
    done: Mapping[tuple[str, str], PrunedResult], entries: Sequence[Entry], goals: Sequence[Goal]
) -> list[list[str]]:
    """Return the table rows: each entry, and again with correction; a dash for goals without a result."""
    table = []
    for entry in entries:
        for with_correction in range(1 + entry.correction):
            results = [done.get((entry.label, goal.name)) for goal in goals]
            values = [None if r is None else r.corrected if with_correction else r.top1 for r in results]
            cells = ["-" if value is None else f"{value:.1f}" for value in values]
            table.append([entry.label + " + correction" * with_correction, *cells])
    return table


def _measure_entry(entry: Entry, goals: Sequence[Goal], notes: Path, score: ScoreConfig) -> list[PrunedResult]:
    """Measure one row of the table; append each result to `notes`."""
    case = setup()
    configs = {goal.name: entry.config(goal) for goal in goals}
    plans = {name: plan_for(config, score) for name, config in configs.items() if config is not None}
    shared = [plan for plan in plans.values() if plan.context(1).pattern is None]
    importance = _scores(case, shared) if shared and entry.steps == 1 else None
    results = []
    for name, plan in plans.items():
        results.append(_measure(case, entry, name, plan, importance if plan in shared else None))
        with notes.open("a") as file:
            file.write(json.dumps(asdict(results[-1])) + "\n")
    return results


def _scores(case: Setup, plans: Sequence[Plan]) -> Importance:
    """Return scores of all kinds that the plans need, with the statistics for the update."""
    kinds = list(dict.fromkeys(kind for plan in plans for kind in plan.sparsity))
    return plans[0].method.criterion(case.dense, find_groups(case.dense, kinds), case.calibration, plans[0].context(0))


def _measure(case: Setup, entry: Entry, name: str, plan: Plan, importance: Importance | None) -> PrunedResult:
    """Prune for one goal; evaluate before and after the correction."""
    model = copy.deepcopy(case.dense)
    first, statistics = None, None
    if importance:
        first = dict(select_cycle_masks(model, importance.scores, plan, cycle_state(model, plan)).masks)
        statistics = dict(importance.statistics)
    if first and not entry.refit:
        shrink(model, groups_for(model, plan), first)
    else:
        for _ in prune_cycles(model, plan, case.calibration, first, statistics):
            pass
    before = accuracy(model, case.held_out)[0]["top1"]
    after = accuracy(corrected(case, model), case.held_out)[0]["top1"] if entry.correction else None
    example = case.held_out[0][0][:1]
    macs = count(model, example).nonzero_macs / count(case.dense, example).macs
    result = PrunedResult(entry.label, name, entry.ours, before, after, macs)
    print(result, flush=True)
    return result
