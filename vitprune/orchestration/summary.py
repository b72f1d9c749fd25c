"""The comparison of the dense and the pruned model, as rows of text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def evaluation(project: Path) -> dict[str, Any] | None:
    """Return metrics/evaluate.json with what metrics/latency.json measured, or None where there is none yet."""
    path = project / "metrics/evaluate.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    measured = path.with_name("latency.json")
    if measured.is_file():
        for name, facts in json.loads(measured.read_text(encoding="utf-8")).items():
            found[name] = found.get(name, {}) | facts
    return found


def rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, dense, pruned) of an evaluation."""
    dense, pruned, kept = evaluation["dense"], evaluation["pruned"], evaluation.get("kept", {})
    found = [
        ("top-1", f"{dense['top1']:.2f} %", f"{pruned['top1']:.2f} %"),
        ("top-5", f"{dense['top5']:.2f} %", f"{pruned['top5']:.2f} %"),
    ]
    for key, name in (("params", "params"), ("nonzero_params", "non-zero params"), ("macs", "MACs")):
        found.append((name, amount(dense[key]), amount(pruned[key]) + _share(kept.get(key))))
    found.append(("non-zero MACs", amount(dense["nonzero_macs"]), amount(pruned["nonzero_macs"])))
    if "latency_ms" in dense:
        found.append(("latency (p10 to p90)", _latency(dense["latency_ms"]), _latency(pruned["latency_ms"])))
    return found


def amount(value: float) -> str:
    """Return a count in thousands, millions or billions."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.2f}{name}"
    return f"{value:.0f}"


def _share(kept: float | None) -> str:
    return "" if kept is None else f" ({100 * kept:.0f} %)"


def _latency(spread: Mapping[str, Any]) -> str:
    return f"{spread['median']:.2f} ms ({spread['p10']:.2f} to {spread['p90']:.2f})"
