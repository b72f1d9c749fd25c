"""The evaluate stage: accuracy, cost and latency of the dense and the final model on the same images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from vitprune import data, models
from vitprune.architectures.classifier import of_same_classes
from vitprune.config.params import Params
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.cost import count
from vitprune.evaluation.latency import environment, latency
from vitprune.pipeline.project_data import METRICS, OUT, device, open_images
from vitprune.runtime import tables
from vitprune.runtime.files import write_json

COMPARED = {"dense": OUT / "dense", "pruned": OUT / "distill"}
EVALUATION = OUT / "evaluate" / "evaluation.parquet"
COSTS = ("params", "nonzero_params", "macs", "nonzero_macs", "nominal_macs")


def run(params: Params) -> None:
    """Write the predictions for every image, metrics/evaluate.json, and the times in metrics/latency.json.

    If the pruned model was cut to some classes, both choose between these on their images.
    """
    pair = {name: models.load(folder).to(device()) for name, folder in COMPARED.items()}
    table = open_images("eval", pair["pruned"], params)
    example = data.example_input(pair["dense"], params.evaluate.latency_batch).to(device())
    result: dict[str, Any] = {}
    predictions = []
    for name, model in pair.items():
        answering = of_same_classes(model, pair["pruned"])
        top, predicted = accuracy(answering, data.eval_batches(table, params.evaluate.batch_size))
        predictions.append(predicted.tolist())
        result[name] = top | asdict(count(model, example))
    columns = zip(table.ids, table.labels.tolist(), *predictions, strict=True)
    rows = [dict(zip(tables.EVALUATION.names, row, strict=True)) for row in columns]
    tables.write_table(rows, tables.EVALUATION, EVALUATION)
    result |= {"kept": kept_costs(result), "top1_drop": result["dense"]["top1"] - result["pruned"]["top1"]}
    write_json(METRICS / "evaluate.json", result | {"images": len(table)})
    write_json(METRICS / "latency.json", _latencies(pair, example, params.evaluate.latency_runs))


def top1_of(rows: Sequence[Mapping[str, Any]], model: str) -> float:
    """Return the top-1 accuracy, in percent, of "dense" or "pruned" from the rows of tables.EVALUATION."""
    correct = sum(bool(row[model] == row["label"]) for row in rows)
    return 100 * correct / len(rows)


def kept_costs(result: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each cost of the pruned model as a fraction of the dense model's."""
    return {cost: result["pruned"][cost] / result["dense"][cost] for cost in COSTS}


def _latencies(pair: dict[str, nn.Module], example: Tensor, runs: int) -> dict[str, Any]:
    times = latency(list(pair.values()), example, runs)
    measured = {
        name: {"latency_ms": time, "throughput": 1000 * len(example) / time["median"]}
        for name, time in zip(pair, times, strict=True)
    }
    return measured | {"environment": environment(example.device)}
