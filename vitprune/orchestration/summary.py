"""Table of the dense and the pruned model: accuracy, costs and latency."""

from collections.abc import Mapping
from typing import Any

from vitprune.runtime.top5 import shows_top5


def rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows (quantity, dense, pruned) of an evaluation."""
    dense, pruned, kept = evaluation["dense"], evaluation["pruned"], evaluation.get("kept", {})
    table = []
    for key, name in (("top1", "top-1"), *((("top5", "top-5"),) if shows_top5(evaluation) else ())):
        table.append((name, f"{dense[key]:.2f} %", f"{pruned[key]:.2f} %"))
    for key, name in (("params", "params"), ("nonzero_params", "non-zero params"), ("macs", "MACs")):
        share = f" ({100 * kept[key]:.0f} %)" if key in kept else ""
        table.append((name, amount(dense[key]), amount(pruned[key]) + share))
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


def _latency(spread: Mapping[str, Any]) -> str:
    return f"{spread['median']:.2f} ms ({spread['p10']:.2f} to {spread['p90']:.2f})"
