"""The stages of the pipeline: each reads files of a project directory and writes files of its own."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune import data, models
from vitprune.architectures import find_groups, merge_heads
from vitprune.config.params import Params, load
from vitprune.criteria import Importance
from vitprune.errors import BadInput
from vitprune.evaluation.accuracy import accuracy, count, environment, latency
from vitprune.groups import Scores
from vitprune.models.card import write_card
from vitprune.models.export import to_onnx, to_timm
from vitprune.models.int8 import checked_int8
from vitprune.pipeline import dense_stage, prune_stage, score_stage, stage_context
from vitprune.pipeline.artifacts import History
from vitprune.pipeline.cycles import MASKS, SCORES, write_masks, write_scores
from vitprune.pipeline.import_scores import read_all
from vitprune.pipeline.stage_context import CALIBRATION, MANIFEST, OUT, calibration, device
from vitprune.pruning.block_steps import next_block_removal
from vitprune.pruning.cycle_masks import (
    cost_model_for,
    cycle_target,
    groups_for,
    reached_cost,
    rescore_borderline,
    select_masks,
)
from vitprune.pruning.plan import kinds_of, plan_of
from vitprune.runtime import tables
from vitprune.runtime.distributed import process_group
from vitprune.runtime.files import sha256, write_csv, write_json
from vitprune.training.loop import FrozenZeros, classification, distilling

METRICS, PLOTS = Path("metrics"), Path("plots")
PARTIAL = Path(".vitprune/partial")  # outside of what DVC empties before a stage


def dataset(params: Params) -> None:
    """Read every image of the source once and write which split it is in."""
    settings = params.dataset
    source = stage_context.source_of(params)
    manifest = data.build_manifest(source, settings.eval_fraction, params.seed, settings.skip_limit)
    tables.write(manifest.rows, tables.MANIFEST, MANIFEST)
    splits = [row["split"] for row in manifest.rows]
    facts = {
        "source": settings.source,
        "classes": len({row["label"] for row in manifest.rows}),
        "class_names": source.classes,
        "train": splits.count("train"),
        "eval": splits.count("eval"),
        "skipped": len(manifest.skipped),
        "overlap": manifest.overlap,
        "sha256": sha256(MANIFEST),
    }
    write_json(METRICS / "dataset.json", facts)


def dense(params: Params) -> None:
    """Make the model to prune: from random, timm's or a checkpoint's weights, trained here if there is a recipe."""
    settings = params.dense
    inputs = [MANIFEST, *([settings.checkpoint] if settings.checkpoint is not None else [])]
    with (
        process_group(device()) as dist,
        stage_context.stage_checkpoint("dense", params, inputs, dist) as place,
    ):
        begun = dense_stage.initial_model(params)
        model = begun.model.to(device())
        evaluate = stage_context.evaluate_model(model, params)
        history = History(OUT / "dense", "dense", dist.rank == 0)
        if settings.train is not None:
            task = classification(model, settings.train.smoothing)
            stage_context.train_model(
                task, settings.train, params, history, place.shelf("training"), begun.held, evaluate, dist=dist
            )
        if dist.rank:  # the first process writes
            return
        history.close(PLOTS / "dense.csv")
        models.save(model, OUT / "dense")
        facts = begun.facts | {"epochs": history.epochs} | _facts(model, OUT / "dense") | evaluate()
        write_json(METRICS / "dense.json", facts)


def calibrate(params: Params) -> None:
    """Draw the calibration set from the train split."""
    settings = params.calibrate
    manifest = tables.read(MANIFEST, tables.MANIFEST)
    rows = data.draw_calibration(
        manifest, stage_context.source_of(params), settings.size, settings.balance, params.seed
    )
    tables.write(rows, tables.CALIBRATION, CALIBRATION)
    facts = {"images": len(rows), "balance": settings.balance, "sha256": sha256(CALIBRATION)}
    write_json(METRICS / "calibrate.json", facts)


def score(params: Params) -> None:
    """Score every unit of the dense model; under torchrun, in several processes at once."""
    plan = plan_of(params)
    with process_group() as dist:
        model = models.load(OUT / "dense").to(device())
        groups = merge_heads(model, find_groups(model, kinds_of(params)), plan.heads)
        work = score_stage.ScoringJob(plan.row.criterion, groups, calibration(model, params), plan.setting_of(1))
        found = work.importance(model, plan.row.additive, PARTIAL, dist, plan.row.collective)
    if found is None:  # the first process has them
        return
    write_json(METRICS / "score.json", {"method": plan.method} | write_scores(OUT / "score", groups, found))
    score_stage.clear_partial(PARTIAL)


def import_scores(params: Params, directory: Path, parsing: str) -> None:
    """Take the dense model's scores from the lists of UP-ViTs' authors, as the score stage would have left them.

    Raises:
        BadInput: the method would measure again what the lists say, or a list is missing or broken.
    """
    plan = plan_of(params)
    if plan.row.settle or plan.row.update:
        raise BadInput(f"prune.method {plan.method}: would measure again what the lists say; set it to upvits-exact")
    model = models.load(OUT / "dense")
    groups = merge_heads(model, find_groups(model, kinds_of(params)), plan.heads)
    facts = {"method": plan.method, "lists": directory.name, "parsing": parsing}
    facts |= write_scores(OUT / "score", groups, Importance(read_all(directory, groups, parsing)))
    write_json(METRICS / "score.json", facts)


def mask(params: Params) -> None:
    """Choose the masks of the first cycle from the scores, measured again where they leave in doubt who stays."""
    plan = plan_of(params)
    model = models.load(OUT / "dense").to(device())
    groups = groups_for(model, plan)
    costs = cost_model_for(model, groups, plan)
    wanted = cycle_target(_scores(), groups, plan, 1, costs)
    target = next_block_removal(groups, wanted.target)
    batches = calibration(model, params) if plan.row.settle else []
    settled = rescore_borderline(model, batches, _scores(), groups, plan, target, costs=costs)
    masks = select_masks(settled.scores, groups, plan, target, costs=costs, cycle=1)
    facts: dict[str, Any] = {"target": dict(target), "cost": reached_cost(masks, plan, 1, costs, wanted.last)}
    facts |= {"settled": dict(settled.facts) or None} | write_masks(OUT / "mask", groups, masks)
    (OUT / "mask" / SCORES).unlink(missing_ok=True)
    if settled.facts:
        models.write_weights(settled.scores, OUT / "mask" / SCORES)
    write_json(METRICS / "mask.json", facts)


def prune(params: Params) -> None:
    """Prune cycle by cycle and recover after each; every cycle leaves its model, masks, scores and metrics.

    The model of a cycle is that of the last step of its recovery: no epoch is chosen by what is evaluated on.
    """
    inputs = [MANIFEST, CALIBRATION, OUT / "dense", OUT / "score", OUT / "mask"]
    with (
        process_group(device()) as dist,
        stage_context.stage_checkpoint("prune", params, inputs, dist) as place,
    ):
        history = History(OUT / "prune", "prune", dist.rank == 0)
        if dist.rank:
            prune_stage.follow(params, place, history)
            return
        done = prune_stage.run(params, place, history, _settled_scores)
        history.close(PLOTS / "prune.csv")
        write_csv(PLOTS / "cycles.csv", done.rows)
        models.save(done.model, OUT / "prune")
        facts = _facts(done.model, OUT / "prune") | done.measured | {"cycles": len(done.rows)}
        write_json(METRICS / "prune.json", facts)


def distill(params: Params) -> None:
    """Fine-tune the pruned model with the dense one as teacher; what is zero stays zero."""
    settings, inputs = params.distill, [MANIFEST, OUT / "dense", OUT / "prune", OUT / "cycles"]
    with (
        process_group(device()) as dist,
        stage_context.stage_checkpoint("distill", params, inputs, dist) as place,
    ):
        model, teacher = models.load(OUT / "prune").to(device()), models.load(OUT / "dense").to(device())
        evaluate = stage_context.evaluate_model(model, params)
        history = History(OUT / "distill", "distill", dist.rank == 0)
        if settings.train is not None:
            task = distilling(model, teacher, settings, settings.train.smoothing, params.seed)
            held = dense_stage.zeros_to_keep(model, params, _held_at_end(teacher, params), settings.hold_zeros)
            shelf, recalls = place.shelf("training"), settings.cache
            stage_context.train_model(
                task, settings.train, params, history, shelf, held, evaluate, dist=dist, recalls=recalls
            )
        if dist.rank:
            return
        history.close(PLOTS / "distill.csv")
        models.save(model, OUT / "distill")
        facts = _facts(model, OUT / "distill") | evaluate() | {"epochs": history.epochs}
        write_json(METRICS / "distill.json", facts)


def evaluate(params: Params) -> None:
    """Measure the dense and the final model side by side, image by image; what a clock said is a file of its own."""
    pair = {"dense": models.load(OUT / "dense").to(device()), "pruned": models.load(OUT / "distill").to(device())}
    table = stage_context.open_images("eval", pair["dense"], params)
    example = data.example_input(pair["dense"], params.evaluate.latency_batch).to(device())
    result: dict[str, Any] = {}
    predictions = []
    for name, model in pair.items():
        top, answers = accuracy(model, data.eval_batches(table, params.evaluate.batch_size))
        predictions.append(answers.tolist())
        result[name] = top | asdict(count(model, example))
    names = tables.EVALUATION.names
    rows = [
        dict(zip(names, row, strict=True)) for row in zip(table.ids, table.labels.tolist(), *predictions, strict=True)
    ]
    tables.write(rows, tables.EVALUATION, OUT / "evaluate" / "evaluation.parquet")
    costs = ("params", "nonzero_params", "macs", "nonzero_macs", "nominal_macs")
    result["kept"] = {cost: result["pruned"][cost] / result["dense"][cost] for cost in costs}
    result["top1_drop"] = result["dense"]["top1"] - result["pruned"]["top1"]
    write_json(METRICS / "evaluate.json", result | {"images": len(table)})
    write_json(METRICS / "latency.json", _latencies(pair, example, params.evaluate.latency_runs))


def export(params: Params) -> None:
    """Write the final model for others: a timm directory with a model card, and ONNX in float and INT8 if asked."""
    model, folder = models.load(OUT / "distill"), OUT / "export"
    example = data.example_input(model, 2)
    facts: dict[str, Any] = {"timm": to_timm(model, folder / "timm", example), "onnx": None, "int8": None}
    write_card(folder / "timm", Path())
    if params.export.onnx:
        facts["onnx"] = to_onnx(model, folder / "model.onnx", example)
    if params.export.int8:
        evaluation = data.eval_batches(stage_context.open_images("eval", model, params), params.evaluate.batch_size)
        facts["int8"] = checked_int8(folder, calibration(model, params), evaluation)
    write_json(METRICS / "export.json", facts)


STAGES: dict[str, Callable[[Params], None]] = {
    stage.__name__: stage for stage in (dataset, dense, calibrate, score, mask, prune, distill, evaluate, export)
}


def run(stage: str, project: Path) -> None:
    """Run one stage in a project directory."""
    STAGES[stage](enter(project))


def enter(project: Path) -> Params:
    """Go to a project directory and read its params."""
    if not project.is_dir():
        raise BadInput(f"{project}: no such directory; give a project's (vitprune init DIR makes one)")
    os.chdir(project)
    params = load(Path("params.yaml"))
    if params.threads is not None:
        torch.set_num_threads(params.threads)
    return params


def _facts(model: nn.Module, directory: Path) -> dict[str, Any]:
    counts = count(model, data.example_input(model, 1))
    return asdict(counts) | {"sha256": sha256(directory / models.WEIGHTS)}


def _latencies(pair: dict[str, nn.Module], example: Tensor, runs: int) -> dict[str, Any]:
    times = latency(list(pair.values()), example, runs)
    measured = {
        name: {"latency_ms": time, "throughput": 1000 * len(example) / time["median"]}
        for name, time in zip(pair, times, strict=True)
    }
    return measured | {"environment": environment(example.device)}


def _scores() -> Scores:
    return models.read_weights(OUT / "score" / SCORES)


def _settled_scores() -> Scores:
    """The scores that chose the first masks: those of the mask stage, where it has measured again."""
    own = OUT / "mask" / SCORES
    return models.read_weights(own) if own.exists() else _scores()


def _held_at_end(dense: nn.Module, params: Params) -> FrozenZeros | None:
    plan = plan_of(params)
    groups = [group for group in groups_for(dense, plan) if group.kind == "weight"]
    return FrozenZeros(groups, models.read_weights(OUT / "cycles" / f"{plan.cycles:02d}" / MASKS)) if groups else None
