"""Pruning of DeiT-Tiny with a few hundred images, without labels or training data, with and without reconstruction.

Calibration on rows 600..799 of imagenet-val-800 (200 images), or on imagenet-one-per-class-1000 (1,000 images);
evaluation on rows 0..599 of imagenet-val-800, standard error about 1.6 points. `top-1` is without reconstruction, with
corrected norms (`prune.correct_norms`). The reconstruction follows a pruning without its held-out images, once per
seed, and is given as the mean of the seeds: 18 passes over 200 images, 4 over 1,000, twice as many at 0.5x MACs, or as
many as the method says. Rows with cycles prune gradually (prune.cycles), with a third of the passes after each of the
three. Rows with merged tokens change the number of tokens (prune.merge_tokens).
Rows of Torch-Pruning are of its setting of highest top-1 (peers.md), which uses labels, followed by the same correction
and reconstruction. SNOWS fits the weights that remain after a selection by magnitude (n:m), on 128 images, for 300
seconds (benchmarks/lib/snows.py). Seconds of the reconstruction include the pruning; one process; other work on the
machine makes them longer. Results are recorded in benchmarks/results/label_free-notes.jsonl, so that an interrupted
benchmark continues; delete the file to start over. Needs VITPRUNE_REAL_DATA, and Torch-Pruning for its rows
(pip install 'vitprune[bench]'). Rows with eight gradients per image take them for the scores (score.fisher_directions)
instead of two; so do rows of unit-obs with reconstruction, 1,000 images or merged tokens, except those of three passes
and one seed of three cycles at 0.7x MACs. Writes benchmarks/results/label_free.json and
docs/results/label_free.md.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.torch_pruning import Goal, Setup, mean_gradients, torch_pruning_case
from benchmarks.lib.deit_tiny import load_dense, load_images, split
from benchmarks.lib.results import Recorded, Row, arguments, real_data, write_results, write_table
from benchmarks.lib.snows import fit_by_snows
from vitprune import PruneConfig, ScoreConfig, plan_for, prune
from vitprune.config.allocation_config import AllocationConfig
from vitprune.config.reconstruct_config import ReconstructConfig
from vitprune.criteria import ScoringContext
from vitprune.evaluation.accuracy import accuracy
from vitprune.pruning.allocation_search import allocated_cycle_masks
from vitprune.pruning.cycle_masks import cycle_state, groups_for
from vitprune.pruning.held_out import fitted_images
from vitprune.pruning.norm_correction import correct_norms, dense_logits
from vitprune.pruning.preparation import prepared
from vitprune.pruning.prune_cycles import prune_cycles, reorder_channels
from vitprune.pruning.reconstruct import reconstruct

ROOT = Path(__file__).parents[2]
Batches = Sequence[tuple[Tensor, Tensor]]
SEEDS, WITHOUT, PASSES, EVALUATIONS = (0, 1, 2), -1, {200: 18, 1000: 4}, 100
LONGER = {"0.5x MACs": 2}  # times as many passes
PEER, SNOWS = "Torch-Pruning", "SNOWS"
SNOWS_IMAGES, SNOWS_SECONDS = 128, 300.0
SCORE = ScoreConfig(memory_mb=4096)
SCORES = {"greedy": {"nm_search": "greedy", "permute": False}, "8 gradients": {"fisher_directions": 8}}

GOALS: dict[str, dict[str, Any]] = {
    "2:4": {"scope": "2:4"},
    "1:4": {"scope": "1:4"},
    "4:8": {"scope": "4:8"},
    "weights 50 %": {"sparsity": 0.5},
    "weights 60 %": {"sparsity": 0.6},
    "weights 75 %": {"sparsity": 0.75},
    "half of the FFN": {"sparsity": {"ffn": 0.5}, "kinds": ["ffn"]},
    "0.7x MACs": {"target": {"macs": 0.7}},
    "0.5x MACs": {"target": {"macs": 0.5}},
}
METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("2:4", "1:4", "4:8"), ("obc", "obc, 8 gradients", "obc, 3 passes", "obc, greedy", "n:m", SNOWS)),
    **dict.fromkeys(
        ("weights 50 %", "weights 60 %", "weights 75 %"), ("obc", "obc, 3 passes", "obc, 3 cycles", "magnitude")
    ),
    "half of the FFN": ("unit-obs", "unit-obs, 3 passes", "unit-obs, 3 cycles", "corp", "channel-magnitude", PEER),
    "0.7x MACs": (
        "unit-obs",
        "unit-obs, 3 passes",
        "unit-obs, 3 cycles",
        "unit-obs, 8 merged tokens",
        "unit-obs, searched widths",
        "channel-magnitude",
        PEER,
    ),
    "0.5x MACs": (
        "unit-obs",
        "unit-obs, 3 passes",
        "unit-obs, 3 cycles",
        "unit-obs, 12 merged tokens",
        "unit-obs, searched widths",
        "channel-magnitude",
        PEER,
    ),
}
PEER_SETUPS = {  # the settings of highest top-1 in docs/results/peers.md
    "half of the FFN": (Goal(removed=0.5), Setup("taylor", "global, not normalised", "ffn")),
    "0.7x MACs": (Goal(macs=0.7), Setup("hessian", "global, not normalised", "ffn")),
    "0.5x MACs": (Goal(macs=0.5), Setup("taylor", "global, not normalised", "ffn")),
}


@dataclass(frozen=True)
class Measured:
    """Top-1 in % of one pruned model; `seed` WITHOUT: not reconstructed. `nats` of held-out images.

    `seconds` are set to 0 by hand in the notes if other work on the machine made them useless.
    """

    goal: str
    method: str
    images: int
    seed: int
    top1: float
    seconds: float
    nats: float = 0.0


@dataclass(frozen=True)
class Case:
    """The dense model, calibration batches by number of images, and evaluation batches."""

    dense: nn.Module
    calibration: Mapping[int, Batches]
    held_out: Batches


def main() -> None:
    """Measure every row and write the tables."""
    options = arguments(
        __doc__,
        {
            "threads": (2, "threads of one process"),
            "seeds": (3, "seeds of the reconstruction"),
            "images": ("200,1000", "numbers of calibration images"),
            "goals": (",".join(GOALS), "goals"),
            "methods": ("", "methods, separated by semicolons; empty: all of each goal"),
        },
    )
    torch.set_num_threads(options.threads)
    case, done = load_case(real_data(), options.quick), Recorded("label_free", Measured, options.quick)
    goals, seeds, methods = options.goals.split(","), SEEDS[: options.seeds], options.methods.split(";")
    if options.quick:
        goals, seeds, methods = ["2:4"], SEEDS[:1], ["obc"]
    for images in (number for number in case.calibration if str(number) in options.images.split(",")):
        for goal in goals:
            for method in (method for method in METHODS[goal] if method in methods or methods == [""]):
                known = {row.seed for row in done if (row.goal, row.method, row.images) == (goal, method, images)}
                wanted = [seed for seed in (WITHOUT, *seeds) if seed not in known]
                for row in measure(case, goal, method, images, wanted, options.quick):
                    done.record(row)
    if not options.quick:
        header = [
            "goal",
            "method",
            "images",
            "top-1",
            "top-1 reconstructed",
            "seeds",
            "seconds",
            "seconds reconstructed",
        ]
        about = f"Dense: {accuracy(case.dense, case.held_out)[0]['top1']:.1f} %. {__doc__}"
        write_table(ROOT / "docs/results/label_free.md", "Without labels, in minutes", about, header, table(done))
    write_results("label_free", result_rows(done), options.quick)


def load_case(folder: Path, quick: bool) -> Case:
    """Read the model and the images."""
    dense = load_dense(folder)
    few, held_out = split(*load_images(folder / "imagenet-val-800.parquet", dense))
    calibration = {200: few}
    if not quick:
        images, labels = load_images(folder / "imagenet-one-per-class-1000.parquet", dense)
        calibration[1000] = list(zip(images.split(50), labels.split(50), strict=True))
    return Case(dense, calibration, held_out)


def measure(case: Case, goal: str, method: str, images: int, seeds: Sequence[int], quick: bool) -> Iterator[Measured]:
    """Prune for one goal, then correct the norms, or reconstruct with every seed; evaluate each."""
    batches = case.calibration[images]
    passes = PASSES[images] * LONGER.get(goal, 1)
    if method.endswith(" passes"):
        passes, seeds = int(method.split()[-2]), [seed for seed in seeds if seed != WITHOUT]
    if not seeds:
        return
    config = ReconstructConfig(passes=1 if quick else passes)
    if method.endswith(" cycles"):
        for seed in (seed for seed in seeds if seed != WITHOUT):
            yield gradual(case, goal, method, images, seed, config)
        return
    if method == SNOWS:
        if SEEDS[0] in seeds:  # nothing is random
            yield by_snows(case, goal, images)
        return
    start = time.perf_counter()
    if WITHOUT in seeds:
        model, _ = prune_once(case.dense, goal, method, batches)
        corrected = correct_norms(model, dense_logits(case.dense, batches), batches, ScoringContext(SCORE))
        model.load_state_dict(dict(corrected.values), strict=False)
        yield evaluated(case, model, goal, method, images, WITHOUT, time.perf_counter() - start)
    start = time.perf_counter()
    pruned, teacher = prune_once(case.dense, goal, method, fitted_images(batches, config))
    seconds = time.perf_counter() - start
    for seed in (seed for seed in seeds if seed != WITHOUT):
        model, start = copy.deepcopy(pruned), time.perf_counter()
        nats = reconstruct(model, teacher, batches, config, seed).facts["nats_after"]
        yield evaluated(case, model, goal, method, images, seed, seconds + time.perf_counter() - start, nats)


def gradual(case: Case, goal: str, method: str, images: int, seed: int, reconstruction: ReconstructConfig) -> Measured:
    """Prune in several cycles, each with a reconstruction, whose passes are divided among them; evaluate."""
    name, _, variant = method.partition(", ")
    cycles, start = int(variant.split()[0]), time.perf_counter()
    each = reconstruction.model_copy(update={"passes": -(-reconstruction.passes // cycles)})
    batches, settings = case.calibration[images], GOALS[goal]
    result = prune(
        case.dense, name, cycles=cycles, reconstruct=each, calibration=batches, config=SCORE, seed=seed, **settings
    )
    nats = result.reconstruction["nats_after"]
    return evaluated(case, result.model, goal, method, images, seed, time.perf_counter() - start, nats)


def by_snows(case: Case, goal: str, images: int) -> Measured:
    """Select by magnitude, then fit by SNOWS; evaluate."""
    start, batches = time.perf_counter(), case.calibration[images]
    model, dense = prune_once(case.dense, goal, "n:m", batches)
    inputs = torch.cat([inputs for inputs, _ in batches])
    iterations = fit_by_snows(model, dense, inputs[:SNOWS_IMAGES], inputs[SNOWS_IMAGES:], SNOWS_SECONDS)
    print("iterations of the layers:", iterations)
    return evaluated(case, model, goal, SNOWS, images, SEEDS[0], time.perf_counter() - start)


def evaluated(
    case: Case, model: nn.Module, goal: str, method: str, images: int, seed: int, seconds: float, nats: float = 0.0
) -> Measured:
    """Return the row of a pruned model."""
    return Measured(goal, method, images, seed, accuracy(model, case.held_out)[0]["top1"], seconds, nats)


def prune_once(dense: nn.Module, goal: str, method: str, batches: Batches) -> tuple[nn.Module, nn.Module]:
    """Return the pruned model and the dense one, whose channels have the same order."""
    if method == PEER:
        peer_goal, setup = PEER_SETUPS[goal]
        pruned = torch_pruning_case(dense, mean_gradients(dense, batches), setup, peer_goal)
        return pruned.eval(), copy.deepcopy(dense)
    name, _, variant = method.partition(", ")
    config = SCORE.model_copy(update=SCORES.get(variant, {}))
    allocation = AllocationConfig(evaluations=EVALUATIONS) if variant == "searched widths" else None
    merged = int(variant.split()[0]) if variant.endswith("merged tokens") else None
    settings = {"method": name, "allocation": allocation, "merge_tokens": merged}
    plan = plan_for(PruneConfig(**settings, **GOALS[goal]), config)
    model, teacher = prepared(copy.deepcopy(dense), plan, batches), copy.deepcopy(dense)
    importance = plan.method.criterion(model, groups_for(model, plan), batches, plan.context(1))
    reorder_channels([model, teacher], importance.orders)
    first = allocated_cycle_masks(model, importance.scores, plan, cycle_state(model, plan), batches).masks
    model = prepared(copy.deepcopy(dense), plan, batches)
    for _ in prune_cycles(model, plan, batches, first, importance.statistics, orders=importance.orders):
        pass
    return model, teacher


def result_rows(done: Sequence[Measured]) -> list[Row]:
    """Return top-1 and seconds of every pruned model."""
    names = [f"{row.goal}, {row.method}, {row.images} images, seed {row.seed}" for row in done]
    rows = [Row(name, row.top1, "top-1 %") for name, row in zip(names, done, strict=True)]
    timed = [(name, row) for name, row in zip(names, done, strict=True) if row.seconds]
    return rows + [Row(f"{name}, seconds", row.seconds, "s") for name, row in timed]


def table(done: Sequence[Measured]) -> list[list[str]]:
    """Return one row per goal, method and number of images."""
    keys = dict.fromkeys((row.goal, row.method, row.images) for row in done)
    rows = []
    for key in sorted(keys, key=lambda key: (list(GOALS).index(key[0]), METHODS[key[0]].index(key[1]), key[2])):
        group = [row for row in done if (row.goal, row.method, row.images) == key]
        plain = [row for row in group if row.seed == WITHOUT]
        seeds = [row for row in group if row.seed != WITHOUT]
        top1 = [f"{mean(row.top1 for row in some):.1f}" if some else "-" for some in (plain, seeds)]
        timed = [[row.seconds for row in some if row.seconds] for some in (plain, seeds)]
        seconds = [f"{mean(some):.0f}" if some else "-" for some in timed]
        rows.append([key[0], key[1], str(key[2]), *top1, str(len(seeds)), *seconds])
    return rows


if __name__ == "__main__":
    main()
