"""Table of the dense and the pruned model: accuracy, costs and latency."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def evaluation(project: Path) -> dict[str, Any] | None:
    """Return metrics/evaluate.json merged with metrics/latency.json, or None before the evaluate stage."""
    path = project / "metrics/evaluate.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    latency = path.with_name("latency.json")
    if latency.is_file():
        for name, facts in json.loads(latency.read_text(encoding="utf-8")).items():
            result[name] = result.get(name, {}) | facts
    return result


def rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows (quantity, dense, pruned) of an evaluation."""
    dense, pruned, kept = evaluation["dense"], evaluation["pruned"], evaluation.get("kept", {})
    table = [
        ("top-1", f"{dense['top1']:.2f} %", f"{pruned['top1']:.2f} %"),
        ("top-5", f"{dense['top5']:.2f} %", f"{pruned['top5']:.2f} %"),
    ]
    for key, name in (("params", "params"), ("nonzero_params", "non-zero params"), ("macs", "MACs")):
        table.append((name, amount(dense[key]), amount(pruned[key]) + _share(kept.get(key))))
    table.append(("non-zero MACs", amount(dense["nonzero_macs"]), amount(pruned["nonzero_macs"])))
    if "latency_ms" in dense:
        table.append(("latency (p10 to p90)", _latency(dense["latency_ms"]), _latency(pruned["latency_ms"])))
    return table


def amount(value: float) -> str:
    """Format a count with k, M or G."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:.0f}"


def _share(kept: float | None) -> str:
    return "" if kept is None else f" ({100 * kept:.0f} %)"


def _latency(spread: Mapping[str, Any]) -> str:
    return f"{spread['median']:.2f} ms ({spread['p10']:.2f} to {spread['p90']:.2f})"
