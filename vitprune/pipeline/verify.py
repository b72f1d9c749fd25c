"""Recompute a finished run's reported values from its artifacts; yield one message per mismatch.

Stages without training are run again on their recorded inputs. Both models classify the evaluation images again. Masks,
shapes, zeros and costs of the models that training wrote are counted. What takes too long is a Note.
"""

import contextlib
import copy
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune import data, models
from vitprune.architectures import structure
from vitprune.architectures.classifier import of_same_classes
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.evaluation.cost import count
from vitprune.evaluation.latency import environment, latency
from vitprune.groups import Group, Masks, shrink
from vitprune.pipeline import stages
from vitprune.pipeline.artifacts import MASKS, mask_facts, model_facts, sparsity_rows
from vitprune.pipeline.compare_outputs import compare_facts, compare_file, compare_outputs, compare_rows, numbers
from vitprune.pipeline.evaluate_stage import COMPARED, COSTS, EVALUATION, kept_costs, top1_of
from vitprune.pipeline.project_data import METRICS, OUT, PLOTS, device, open_images, rows_of_classes
from vitprune.pipeline.prune_stage import cycle_row
from vitprune.pipeline.report.page import write_report
from vitprune.pipeline.score_stage import load_prepared
from vitprune.pruning.cycle_masks import groups_for
from vitprune.pruning.plan import plan_of
from vitprune.runtime import tables
from vitprune.runtime.eval_mode import eval_mode
from vitprune.runtime.files import read_json, read_json_lines, sha256
from vitprune.runtime.kept_classes import kept_classes
from vitprune.runtime.messages import Note

Lines = Iterator[str]
REPEATED = ("dataset", "calibrate", "score", "mask", "export", "report")
TRAINED = ("dense", "prune", "distill")
SAMPLE = 256  # images of a large evaluation split that both models classify again
NEAR_TIE = 1e-3  # relative to the largest logit: another CPU may choose the second class
LATENCY_FACTOR, MEASUREMENTS = 3.0, 5


@dataclass(frozen=True)
class RecordedRun:
    """A finished run in the current directory.

    Attributes:
        params: Its params.yaml.
        outputs: Paths that every stage wrote, as dvc.lock names them.
        seconds: Computing time of every stage.
        limit: Seconds; stages that took longer are not run again.
    """

    params: Params
    outputs: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]
    limit: float

    def takes_too_long(self, stage: str) -> bool:
        """Whether a stage took longer than the limit."""
        return self.seconds.get(stage, 0.0) > self.limit


def repeat(stage: str, run: RecordedRun) -> Lines:
    """Run a stage without training again on its recorded inputs, and compare all that it writes."""
    if run.takes_too_long(stage):
        yield Note(f"took {run.seconds[stage]:.0f} s and was not run again (--limit {run.limit:g}, or use --rerun)")
        return
    target = run.params.prune.target
    if stage == "mask" and target is not None and target.is_measured:
        yield Note("follows from measured latencies and was not run again")
        return
    names = [name.rstrip("/") for name in run.outputs.get(stage, ())]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        aside = Path(folder)
        _move(Path(), aside / "recorded", names)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if stage == "report":
                    write_report(Path(), OUT / "report/report.html")
                else:
                    stages.run(stage, Path())
            yield from compare_outputs(aside / "recorded", Path(), names)
        finally:
            _move(Path(), aside / "again", names)
            _move(aside / "recorded", Path(), names)


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source / name, target / name)


def predictions(run: RecordedRun) -> Lines:
    """Classify the evaluation images with both models again, and recompute accuracy and costs."""
    rows = tables.read_table(EVALUATION, tables.EVALUATION).to_pylist()
    manifest = rows_of_classes(run.params.prune.classes).to_pylist()
    eval_rows = [{"id": row["id"], "label": row["label"]} for row in manifest if row["split"] == "eval"]
    yield from compare_rows(str(EVALUATION), rows, eval_rows)
    reported = read_json(METRICS / "evaluate.json")
    pair = {name: models.load(folder).to(device()) for name, folder in COMPARED.items()}
    step = max(1, len(rows) // SAMPLE) if run.takes_too_long("evaluate") else 1
    if step > 1:
        yield Note(f"{len(rows[::step])} of {len(rows)} images were classified again (--limit, or use --rerun)")
    example = data.example_input(pair["dense"], run.params.evaluate.latency_batch).to(device())
    for name, model in pair.items():
        logits = _logits(of_same_classes(model, pair["pruned"]), run.params, step)
        clear, chosen = _clear(logits), _labels(logits.argmax(dim=1), pair["pruned"])
        for row, prediction, certain in zip(rows[::step], chosen.tolist(), clear.tolist(), strict=True):
            if certain and row[name] != prediction:
                yield f"{EVALUATION}: {row['id']}: {name} is {row[name]}, the model predicts {prediction}"
        facts: dict[str, Any] = asdict(count(model, example)) | {"top1": top1_of(rows, name)}
        if step == 1 and bool(clear.all()):
            labels = torch.tensor([row["label"] for row in rows]).unsqueeze(1)
            best = _labels(logits.topk(min(5, logits.shape[1]), dim=1).indices, pair["pruned"])
            top5 = (best == labels).any(dim=1)
            facts["top5"] = 100 * int(top5.sum()) / len(rows)
        yield from compare_facts(f"metrics/evaluate.json: {name}", reported[name], facts)
    drop = {"top1_drop": top1_of(rows, "dense") - top1_of(rows, "pruned"), "images": len(rows)}
    yield from compare_facts("metrics/evaluate.json", reported, drop | {"kept": kept_costs(reported)})


def _logits(model: nn.Module, params: Params, step: int = 1) -> Tensor:
    """Return the logits of every `step`-th evaluation image, (images, classes), on the CPU."""
    table, batch = open_images("eval", model, params), params.evaluate.batch_size
    rows = range(0, len(table), step)
    with torch.inference_mode(), eval_mode(model):
        parts = [rows[first : first + batch] for first in range(0, len(rows), batch)]
        images = (torch.stack(list(map(table.image, part))) for part in parts)
        return torch.cat([model(inputs.to(device())).float().cpu() for inputs in images])


def _labels(outputs: Tensor, model: nn.Module) -> Tensor:
    """Return the classes of the dense model for outputs of a model."""
    classes = kept_classes(model)
    return outputs if classes is None else torch.tensor(classes)[outputs]


def _clear(logits: Tensor) -> Tensor:
    """Return a mask (images,) of the predictions that rounding errors cannot change."""
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    return (best[:, 0] - best[:, -1]) > NEAR_TIE * logits.abs().amax(dim=1)


def latencies(run: RecordedRun) -> Lines:
    """Measure both models again on the same kind of device; the speed-up must agree within a factor of 3."""
    recorded = read_json(METRICS / "latency.json")
    pair = [models.load(folder).to(device()) for folder in COMPARED.values()]
    here = environment(device())
    if recorded["environment"]["device"] != here["device"]:
        yield Note(f"measured on {recorded['environment']['device']}, not measured again on {here['device']}")
        return
    example = data.example_input(pair[0], run.params.evaluate.latency_batch).to(device())
    before, after = (recorded[name]["latency_ms"] for name in COMPARED)
    low, high = before["p10"] / after["p90"], before["p90"] / after["p10"]
    measured = []
    for _ in range(MEASUREMENTS):  # other processes disturb a measurement, but not each in the same way
        dense, pruned = latency(pair, example, max(5, min(20, run.params.evaluate.latency_runs)))
        measured.append(dense["p10"] / pruned["p10"])
        if low / LATENCY_FACTOR < measured[-1] < high * LATENCY_FACTOR:
            break
    else:
        ratio = before["median"] / after["median"]
        yield f"metrics/latency.json: speed-up {ratio:.2f}, measured again {min(measured):.2f} to {max(measured):.2f}"
    for name in COMPARED:
        times = recorded[name]["latency_ms"]
        throughput = {"throughput": 1000 * times["batch"] / times["median"]}
        yield from compare_facts(f"metrics/latency.json: {name}", recorded[name], throughput)


def cycles(run: RecordedRun) -> Lines:
    """Compare every cycle's masks with its model, tables and the previous cycle, and the last with `prune`'s model."""
    plan = plan_of(run.params)
    dense = load_prepared(plan)
    groups = groups_for(dense, plan)
    folders = [OUT / "cycles" / f"{number:02d}" for number in range(1, plan.config.cycles + 1)]
    present = sorted(OUT.glob("cycles/[0-9]*"))
    if present != folders:
        yield f"out/cycles: contains {[path.name for path in present]}, but prune.cycles is {plan.config.cycles}"
        return
    previous, label = models.read_weights(OUT / "mask" / MASKS), "out/mask"
    rows = []
    for number, folder in enumerate(folders, 1):
        masks = models.read_weights(folder / MASKS)
        yield from _masks(folder, groups)
        yield from _regrown(folder, previous, masks, label)
        yield from _wrong_shapes(folder, dense, groups, masks)
        yield from _costs(folder, folder / "metrics.json")
        if not run.takes_too_long("evaluate"):
            yield from _top1(folder, run.params)
        rows.append(cycle_row(number, groups, masks, read_json(folder / "metrics.json")))
        previous, label = masks, "the previous cycle"
    yield from compare_rows("plots/cycles.csv", numbers(PLOTS / "cycles.csv"), rows)
    last = read_json(folders[-1] / "metrics.json")
    facts = {"cycles": plan.config.cycles, "sha256": last["sha256"], "top1": last["top1_after"]}
    yield from compare_file(METRICS / "prune.json", facts)


def weights(run: RecordedRun) -> Lines:
    """Count parameters and MACs of the dense, the pruned and the final model again, and compare their checksums."""
    for stage in TRAINED:
        yield from _costs(OUT / stage, METRICS / f"{stage}.json")
    evaluated = read_json(METRICS / "evaluate.json")
    for name, folder in COMPARED.items():
        metrics = read_json(METRICS / f"{folder.name}.json")
        same = run.params.prune.classes is None or name == "pruned"  # else top-1 is that among fewer classes
        expected = {key: metrics[key] for key in (*COSTS, *(("top1", "top5") if same else ()))}
        yield from compare_facts(f"metrics/evaluate.json: {name}", evaluated[name], expected)


def curves(run: RecordedRun) -> Lines:
    """Compare every training history with its plot, and its length with the number of epochs in the metrics."""
    for stage in TRAINED:
        path = OUT / stage / "history.jsonl"
        rows = read_json_lines(path)
        values = [{name: value for name, value in row.items() if name != "stage"} for row in rows]
        yield from compare_rows(f"plots/{stage}.csv", numbers(PLOTS / f"{stage}.csv"), values)
        if stage != "prune":
            yield from compare_file(METRICS / f"{stage}.json", {"epochs": len(rows)})


def trained_stages(run: RecordedRun) -> Lines:
    """Say which stages are only repeated by a rerun."""
    yield Note(f"{', '.join(TRAINED)}: training is repeated by --rerun only")


CHECKS: dict[str, Callable[[RecordedRun], Lines]] = {
    **{check.__name__: check for check in (cycles, weights, curves, predictions)},
    **{stage: partial(repeat, stage) for stage in REPEATED},
    **{check.__name__: check for check in (latencies, trained_stages)},
}


def recheck(name: str, run: RecordedRun) -> Lines:
    """Run one of CHECKS in the current directory; an artifact that cannot be read is a mismatch, too.

    Yields:
        One line per mismatch, and notes.
    """
    try:
        yield from CHECKS[name](run)
    except BadInput as error:
        yield str(error)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        yield f"{name}: cannot be computed again ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _masks(folder: Path, groups: Sequence[Group]) -> Lines:
    masks = models.read_weights(folder / MASKS)
    for group in groups:
        if group.name not in masks or masks[group.name].numel() != group.units:
            yield f"{folder / MASKS}: no mask of {group.units} units for {group.name}"
            return
    path = folder / "sparsity.parquet"
    rows = tables.read_table(path, tables.SPARSITY).to_pylist()
    yield from compare_rows(str(path), rows, sparsity_rows(groups, masks))
    facts = mask_facts(groups, masks) | {"masks_sha256": sha256(folder / MASKS)}
    yield from compare_file(folder / "metrics.json", facts)


def _regrown(folder: Path, before: Masks, masks: Masks, label: str) -> Lines:
    """Yield a line for every group with units that earlier masks have removed."""
    for name, mask in masks.items():
        regrown = int((mask & ~before[name]).sum()) if name in before else mask.numel()
        if regrown:
            yield f"{folder / MASKS}: {name} keeps {regrown} units that {label} removed"


def _wrong_shapes(folder: Path, dense: nn.Module, groups: Sequence[Group], masks: Masks) -> Lines:
    """Compare the shapes and the zeros of a cycle's model with those that its masks give."""
    model = models.load(folder)
    structured = [group for group in groups if group.kind != "weight"]
    expected, actual = structure(shrink(copy.deepcopy(dense), structured, masks)), structure(model)
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            yield f"{folder}: {name} has shape {actual.get(name)}, its masks give {expected.get(name)}"
    for group in groups:
        if group.kind == "weight":
            nonzero = int(model.get_parameter(group.name)[~masks[group.name]].count_nonzero())
            if nonzero:
                yield f"{folder}: {nonzero} weights of {group.name} are not zero although its masks remove them"


def _top1(folder: Path, params: Params) -> Lines:
    """Measure the top-1 of a cycle's model again."""
    model, reported = models.load(folder).to(device()), read_json(folder / "metrics.json")["top1_after"]
    logits, labels = _logits(model, params), open_images("eval", model, params).labels
    top1 = 100 * float((_labels(logits.argmax(dim=1), model) == labels).double().mean())
    if abs(top1 - reported) > 100 * int((~_clear(logits)).sum()) / len(labels) + 1e-9:
        yield f"{folder / 'metrics.json'}: top1_after is {reported}, computed again {top1}"


def _costs(folder: Path, facts: Path) -> Lines:
    yield from compare_file(facts, model_facts(models.load(folder), folder))
