"""Content of the report's sections, from tables and metrics; None or empty if the inputs are missing."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import BadInput
from vitprune.evaluation import paired_test
from vitprune.pipeline.report import inputs, numbers, plots
from vitprune.pipeline.report.numbers import Quantity
from vitprune.runtime import tables

_PICTURES = 24
_WORST_CLASSES = 10
_PAIRS = ("images", "both", "dense_only", "pruned_only", "neither", "discordant")


def class_names(dataset: dict[str, Any] | None) -> list[str]:
    """Return the class names by label from metrics/dataset.json (key class_names); empty if it has none."""
    names = inputs.look_up(dataset, "class_names")
    return [str(name) for name in names] if isinstance(names, list) else []


def losses(path: Path, evaluation: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the paired counts, the confidence interval of the difference, and the classes with the largest loss.

    Raises:
        BadInput: the accuracies of the table and of the metrics differ.
    """
    if not path.exists():
        return None
    predictions = tables.read_table(path, tables.EVALUATION)
    if predictions.num_rows == 0:
        return None
    pairs = paired_test.mcnemar_table(predictions)
    for model, right in (("dense", pairs.both + pairs.dense_only), ("pruned", pairs.both + pairs.pruned_only)):
        computed, reported = 100 * right / pairs.images, evaluation[model]["top1"]
        if abs(computed - reported) > 0.05:
            raise BadInput(
                f"{path}: its {model} top-1 is {computed:.2f} % but metrics/evaluate.json says {reported:.2f} %; "
                "run `vitprune evaluate` again"
            )
    low, high = pairs.interval
    lost = [result for result in paired_test.compare_classes(predictions) if result.pruned < result.dense]
    return {
        "counts": {key: numbers.grouped(f"paired.{key}", getattr(pairs, key)) for key in _PAIRS},
        "pairs": pairs,
        "difference": numbers.signed("paired.difference", pairs.difference, 2),
        "low": numbers.signed("paired.low", low, 2),
        "high": numbers.signed("paired.high", high, 2),
        "p_different": numbers.fixed("paired.p_different", pairs.p_different, 4),
        "losing_classes": numbers.grouped("classes.losing", len(lost)),
        "classes": [_class_row(result, names) for result in lost[:_WORST_CLASSES]],
    }


def _class_row(result: paired_test.ClassComparison, names: Sequence[str]) -> dict[str, Any]:
    def named(label: int) -> str:
        return names[label] if 0 <= label < len(names) else str(label)

    stem = f"class.{result.label}"
    dense, pruned = 100 * result.dense / result.images, 100 * result.pruned / result.images
    return {
        "name": named(result.label),
        "images": numbers.grouped(f"{stem}.images", result.images),
        "lost": numbers.grouped(f"{stem}.lost", result.dense - result.pruned),
        "dense": numbers.fixed(f"{stem}.dense", dense, 1),
        "pruned": numbers.fixed(f"{stem}.pruned", pruned, 1),
        "change": numbers.signed(f"{stem}.change", pruned - dense, 1),
        "taken_for": None if result.taken_for is None else named(result.taken_for),
        "taken_times": numbers.grouped(f"{stem}.taken_times", result.taken_times),
    }


def sparsity(out: Path) -> dict[str, Any] | None:
    """Return the sparsity of every group after pruning: a plot per family of groups, and a table."""
    path = max(out.glob("cycles/*/sparsity.parquet"), default=out / "mask/sparsity.parquet")
    if not path.exists():
        return None
    rows = tables.read_table(path, tables.SPARSITY).to_pylist()
    families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        families[row["kind"], _pattern(row["group"])].append(row)
    panels: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for (kind, pattern), members in families.items():
        panels[kind, pattern if len(members) > 1 else ""] += members  # groups with a unique pattern share one plot
    drawn = [_sparsity_plot(f"sparsity{at}", *panel, members) for at, (panel, members) in enumerate(panels.items())]
    return {"plots": drawn, "groups": [_group_row(row) for row in rows]}


def _sparsity_plot(name: str, kind: str, pattern: str, rows: list[dict[str, Any]]) -> plots.Plot:
    labels = [".".join(_numbers(row["group"])) if pattern else row["group"] for row in rows]
    percents = [100 * (numbers.finite(row["sparsity"]) or 0.0) for row in rows]
    units = sum(row["units"] for row in rows)
    removed = 100 * (1 - sum(row["kept"] for row in rows) / units) if units else None
    title = f"Sparsity of {kind} groups {pattern}".strip()
    described = f"{title}: {len(rows)} groups, {min(percents):.0f} to {max(percents):.0f} % removed"
    svg = plots.bars(name, described, labels, percents)
    figure = numbers.fixed(f"removed.{kind}{'.' if pattern else ''}{pattern}", removed, 1)
    return plots.Plot(svg, kind, pattern, figure)


def _group_row(row: dict[str, Any]) -> dict[str, Any]:
    stem = f"group.{row['group']}"
    return {
        "group": row["group"],
        "kind": row["kind"],
        "units": numbers.grouped(f"{stem}.units", row["units"]),
        "kept": numbers.grouped(f"{stem}.kept", row["kept"]),
        "sparsity": numbers.fixed(f"{stem}.sparsity", 100 * (numbers.finite(row["sparsity"]) or 0.0), 1),
    }


def _numbers(group: str) -> list[str]:
    return [part for part in group.split(".") if part.isdecimal()]


def _pattern(group: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in group.split("."))


def calibration(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Return up to 24 calibration images, spread evenly over the labels.

    Raises:
        BadInput: an image cannot be decoded.
    """
    if not path.exists():
        return None
    table = tables.read_table(path, tables.CALIBRATION)
    by_label = np.argsort(table["label"].to_numpy(), kind="stable")
    indices = by_label[np.linspace(0, table.num_rows - 1, min(_PICTURES, table.num_rows)).astype(int)]
    pictures = []
    for row in table.take(indices).to_pylist():
        try:
            uri, tiny = plots.thumbnail(row["image"]["bytes"])
        except (OSError, TypeError):
            raise BadInput(f"{path}: image {row['id']} cannot be decoded; run `vitprune calibrate` again") from None
        label = row["label"]
        pictures.append(
            {
                "uri": uri,
                "tiny": tiny,
                "id": row["id"],
                "label": Quantity(f"calibration.{row['id']}.label", label, str(label)),
                "name": names[label] if 0 <= label < len(names) else "",
            }
        )
    return {
        "pictures": pictures,
        "shown": numbers.grouped("calibration.shown", len(pictures)),
        "images": numbers.grouped("calibration.images", table.num_rows),
    }
