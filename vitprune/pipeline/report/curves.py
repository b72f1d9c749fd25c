"""Plots of the report over time: accuracy and sparsity over cycles, loss and top-1 over training steps."""

from pathlib import Path
from typing import Any

from vitprune.pipeline.report import inputs, numbers, plots
from vitprune.runtime.files import read_optional_json

_CYCLE_SIZES = ("params", "macs", "nonzero_params", "nonzero_macs")
_LEGIBLE_POINTS = 40  # curves with fewer points have markers
_DASHES = ("-", "--", ":", "-.")


def cycles(project: Path, dense_top1: float) -> dict[str, Any] | None:
    """Return plots and rows of the pruning cycles: accuracy, sparsity, cost, and checksum of the masks."""
    records = _cycle_records(project)
    if not records:
        return None
    drawn = [_accuracy_plot(records, dense_top1), _schedule_plot(records)]
    return {"plots": drawn, "rows": [_cycle_row(record) for record in records]}


def _cycle_row(record: dict[str, Any]) -> dict[str, Any]:
    stem, shares = f"cycle.{record['cycle']:.0f}", _by_kind(record).items()
    number = {key: numbers.finite(record.get(key)) for key in ("top1_before", "top1_after", *_CYCLE_SIZES)}
    return {
        "cycle": numbers.grouped(f"{stem}.cycle", record["cycle"]),
        "sparsity": [(kind, numbers.fixed(f"{stem}.sparsity.{kind}", 100 * share, 1)) for kind, share in shares],
        "top1": [numbers.fixed(f"{stem}.{key}", number[key], 2) for key in ("top1_before", "top1_after")],
        "sizes": [numbers.si_count(f"{stem}.{key}", number[key]) for key in _CYCLE_SIZES],
        "digest": str(record.get("masks_sha256") or ""),
    }


def _cycle_records(project: Path) -> list[dict[str, Any]]:
    read = (read_optional_json(path) for path in sorted(project.glob("out/cycles/*/metrics.json")))
    records = [record for record in read if record is not None]
    if not records:
        columns = inputs.read_columns(project / "plots/cycles.csv")
        records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    numbered = [record for record in records if numbers.finite(record.get("cycle")) is not None]
    return sorted(numbered, key=lambda record: float(record["cycle"]))


def _by_kind(record: dict[str, Any]) -> dict[str, float]:
    reached = record.get("sparsity")
    shares = reached if isinstance(reached, dict) else {"all": reached}
    return {kind: share for kind, value in shares.items() if (share := numbers.finite(value)) is not None}


def _accuracy_plot(records: list[dict[str, Any]], dense_top1: float) -> plots.Plot:
    # Cycle k spans k-1 to k: pruning at its start, the end of fine-tuning at its end.
    x, y = [0.0], [dense_top1]
    for index, record in enumerate(records):
        steps = ((index, record.get("top1_before")), (index + 1, record.get("top1_after")))
        for position, value in steps:
            if (top1 := numbers.finite(value)) is not None:
                x.append(float(position))
                y.append(top1)
    dense = plots.Line([0, len(records)], [dense_top1] * 2, "dense", "dense", "--")
    lines = [dense, plots.Line(x, y, "pruned", marker="o")]
    description = f"Top-1 over {len(records)} cycles, from {y[0]:.2f} % to {y[-1]:.2f} %"
    axes = _cycle_axis(records), plots.Axis("top-1, %")
    svg = plots.curves("accuracy", description, lines, *axes, range(len(records)))
    return plots.Plot(svg, "Accuracy", "after pruning and after fine-tuning")


def _schedule_plot(records: list[dict[str, Any]]) -> plots.Plot:
    lines = []
    for at, kind in enumerate(_by_kind(records[-1])):
        x, y = [0.0], [0.0]
        for index, record in enumerate(records):
            share = 100 * _by_kind(record).get(kind, 0.0)
            x += [index, index + 1]
            y += [share, share]
        lines.append(plots.Line(x, y, kind, style=_DASHES[at % len(_DASHES)]))
    ends = ", ".join(f"{line.label} {line.y[-1]:.0f} %" for line in lines)
    axis = plots.Axis("removed, %", (0, 100), (0, 25, 50, 75, 100))
    svg = plots.curves("schedule", f"Sparsity over cycles, at the end {ends}", lines, _cycle_axis(records), axis)
    kinds = "" if len(lines) == 1 else "by kind of group"
    return plots.Plot(svg, "Sparsity", kinds)


def _cycle_axis(records: list[dict[str, Any]]) -> plots.Axis:
    middles = [index + 0.5 for index in range(len(records))]
    return plots.Axis("cycle", ticks=middles, names=[f"{record['cycle']:.0f}" for record in records])


def training(plots_dir: Path, dense_top1: float) -> list[plots.Plot]:
    """Return plots of loss and top-1 over optimizer steps for each stage that trained."""
    drawn = []
    titles = {"dense": "Dense training", "prune": "Fine-tuning while pruning", "distill": "Distillation"}
    for stage, title in titles.items():
        columns = inputs.read_columns(plots_dir / f"{stage}.csv")
        steps, starts = _unrolled(columns)
        for key, label in (("loss", "loss"), ("top1", "top-1, %"), ("held_out_nats", "held-out KL divergence, nats")):
            values = columns.get(key, [])
            points = [(x, y) for x, y in zip(steps, values, strict=False) if numbers.finite(y) is not None]
            if len(points) < 2:
                continue
            x, y = [point[0] for point in points], [point[1] or 0.0 for point in points]
            color, marker = "dense" if stage == "dense" else "pruned", "o" if len(x) < _LEGIBLE_POINTS else ""
            lines = [plots.Line(x, y, label.removesuffix(", %"), color, marker=marker)]
            if key == "top1" and stage != "dense":
                lines.insert(0, plots.Line([0, steps[-1]], [dense_top1] * 2, "dense", "dense", "--"))
            description = f"{title}: {label} from {y[0]:.4g} to {y[-1]:.4g} over {steps[-1]:.0f} steps"
            axes = plots.Axis("steps"), plots.Axis(label)
            svg = plots.curves(f"{stage}-{key}", description, lines, *axes, starts)
            drawn.append(plots.Plot(svg, title, label.removesuffix(", %")))
    return drawn


def _unrolled(columns: dict[str, list[float | None]]) -> tuple[list[float], list[float]]:
    # Steps restart at every cycle: concatenate them, and return the first step of each later cycle.
    steps = columns.get("step") or columns.get("epoch") or []
    cycle = columns.get("cycle") or [None] * len(steps)
    unrolled: list[float] = []
    starts: list[float] = []
    offset = last = 0.0
    for at, step in enumerate(steps):
        now = last if step is None else step
        if now < last:
            offset += last
        if at and cycle[at] != cycle[at - 1]:
            starts.append(unrolled[-1])
        unrolled.append(offset + now)
        last = now
    return unrolled, starts
