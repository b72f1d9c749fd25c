"""Table of a sweep's runs (Parquet, Markdown, HTML) and its Pareto plot, from the metrics of the runs."""

import base64
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitprune.errors import BadInput
from vitprune.pipeline.report.inputs import template
from vitprune.pipeline.report.pareto_plot import SCALE, DensePoint, Point, draw, front
from vitprune.runtime import tables
from vitprune.runtime.files import read_optional_json, write_text

NUMBERS = ("top1", "top5", "params", "nonzero_params", "macs", "nonzero_macs", "latency_ms", "throughput")
SWEEP = pa.schema(
    [(name, pa.string()) for name in ("run", "method", "target", "status", "error")]
    + [(f"{prefix}{name}", pa.float64()) for prefix in ("", "dense_") for name in NUMBERS]
    + [("gain", pa.float64()), ("front", pa.bool_()), ("seconds", pa.float64())]
)
COST = {"throughput": "throughput", "macs": "nonzero_macs", "params": "nonzero_params"}
FINISHED = "finished"
HEADER = (
    "method", "target", "top-1, %", "drop", "params, M", "non-zero", "MACs, G", "non-zero", "ms", "images/s",
    "speed-up", "front",
)  # fmt: skip


def write_sweep(folder: Path, out: Path) -> list[dict[str, Any]]:
    """Write the table and the Pareto plot of a sweep into the directory `out`, and return the rows of the table.

    Unfinished runs have no numbers; without a finished run, no plot is written.

    Raises:
        BadInput: the folder has no sweep.json, or the metrics of a finished run cannot be read.
    """
    plan = read_optional_json(folder / "sweep.json")
    if plan is None:
        raise BadInput(f"{folder / 'sweep.json'}: no such file; give a folder written by vitprune sweep")
    rows = [_row(folder, run, plan["against"]) for run in plan["runs"]]
    done = [row for row in rows if row["status"] == FINISHED]
    if done:
        dense = DensePoint(done[0]["dense_top1"], _dense_cost(done, plan["against"]))
        best = front([(1.0, dense.top1), *((row["gain"], row["top1"]) for row in done)])
        for at, row in enumerate(done, start=1):
            row["front"] = at in best
        points = [Point(row["gain"], row["top1"], row["method"], row["target"]) for row in done]
        for kind in ("svg", "png"):
            draw(points, dense, plan["against"], plan["title"], out / f"pareto.{kind}")
    tables.write_table(rows, SWEEP, out / "sweep.parquet")
    write_text(out / "sweep.md", _markdown(plan["title"], rows))
    write_text(out / "sweep.html", _html(plan["title"], rows, out / "pareto.png" if done else None))
    return rows


def _row(folder: Path, run: Mapping[str, str], against: str) -> dict[str, Any]:
    """Return the row of a run: method and target, status, and the metrics of the pruned and the dense model."""
    waiting = {"status": "waiting", "error": "", "seconds": None}
    result = read_optional_json(folder / "results" / f"{run['name']}.json") or waiting
    row: dict[str, Any] = {"run": run["name"], "method": run["method"], "target": run["target"]}
    row |= {name: result[name] for name in ("status", "error", "seconds")} | {"front": False}
    if result["status"] != FINISHED:
        return row
    directory = folder / run["directory"]
    evaluation = read_optional_json(directory / "metrics/evaluate.json")
    speed = read_optional_json(directory / "metrics/latency.json")
    if evaluation is None or speed is None:
        raise BadInput(f"{directory}: its evaluation metrics are missing; run the sweep again")
    for model, prefix in (("pruned", ""), ("dense", "dense_")):
        measured = evaluation[model] | speed[model]
        measured["latency_ms"] = measured["latency_ms"]["median"]
        row |= {f"{prefix}{name}": float(measured[name]) for name in NUMBERS}
    pruned, dense = row[COST[against]], row[f"dense_{COST[against]}"]
    return row | {"gain": pruned / dense if against == "throughput" else dense / pruned}


def _dense_cost(rows: Sequence[Mapping[str, Any]], against: str) -> float:
    """Return the cost of the dense model in the unit of the plot; throughput is the median over all runs."""
    return SCALE[against] * float(statistics.median(row[f"dense_{COST[against]}"] for row in rows))


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [row["method"], row["target"]]
    if row["status"] != FINISHED:
        return [*cells, row["status"], *[""] * (len(HEADER) - 3)]
    amounts = [row["params"] / 1e6, row["nonzero_params"] / 1e6, row["macs"] / 1e9, row["nonzero_macs"] / 1e9]
    cells += [f"{row['top1']:.2f}", f"{row['dense_top1'] - row['top1']:+.2f}", *(f"{amount:.3g}" for amount in amounts)]
    cells += [f"{row['latency_ms']:.2f}", f"{row['throughput']:.1f}"]
    return [*cells, f"{row['throughput'] / row['dense_throughput']:.2f}x", "yes" if row["front"] else ""]


def _dense_cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the row of the dense model, with medians over the runs."""
    done = [row for row in rows if row["status"] == FINISHED]
    if not done:
        return ["dense", "", "", *[""] * (len(HEADER) - 3)]
    medians = {name: statistics.median(row[f"dense_{name}"] for row in done) for name in NUMBERS}
    both = medians | {f"dense_{name}": value for name, value in medians.items()}
    return ["dense", "", *_cells(both | {"method": "", "target": "", "status": FINISHED, "front": False})[2:-2], "", ""]


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line with the error of each failed run."""
    return [f"{row['run']}: {row['error']}" for row in rows if row["status"] == "failed"]


def _markdown(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"# {title}", ""]
    if any(row["status"] == FINISHED for row in rows):
        lines += ["![top-1 against the cost](pareto.png)", ""]
    table = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 3), ":-:"], _dense_cells(rows), *map(_cells, rows)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines += ["", ABOUT]
    if failed := failures(rows):
        lines += ["", "Failed:", "", *(f"- {line}" for line in failed)]
    return "\n".join(lines) + "\n"


ABOUT = (
    "Every run measured the dense and the pruned model alternately; the speed-up is their ratio. The row of the dense "
    "model has the medians over all runs. A run is on the Pareto front if no other run is at least as good in "
    "both accuracy and cost and better in one."
)


def _html(title: str, rows: Sequence[Mapping[str, Any]], picture: Path | None) -> str:
    return template("sweep.html.j2").render(
        title=title,
        header=HEADER,
        dense=_dense_cells(rows),
        rows=[(_cells(row), bool(row["front"])) for row in rows],
        picture=base64.b64encode(picture.read_bytes()).decode("ascii") if picture is not None else None,
        failures=failures(rows),
        about=ABOUT,
    )
