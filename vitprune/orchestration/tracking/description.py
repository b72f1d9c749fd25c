"""Text at the top of a run's page in MLflow: result, place of the report, versions of the packages."""

from collections.abc import Iterable, Mapping
from typing import Any

from vitprune.orchestration.summary import amount

REPORT = "out/report/report.html"
_COSTS = (
    ("macs", "MACs"),
    ("nonzero_macs", "non-zero MACs"),
    ("params", "parameters"),
    ("nonzero_params", "non-zero parameters"),
)


def description(start: Mapping[str, Any], stages: Iterable[Mapping[str, Any]], error: str) -> str:
    """Return the description of a run, as Markdown.

    Args:
        start: The start event of the run log.
        stages: Its stage events.
        error: The reason of a failure; empty if there is none.
    """
    params, versions = start["params"], start.get("versions", {})
    measured = {k: v for stage in stages if stage["stage"] == "evaluate" for k, v in stage.get("metrics", {}).items()}
    setting = " / ".join(str(params.get(key)) for key in ("prune.method", "model.name", "dataset.source"))
    lines = [f"**{setting}**", "", *_table(measured)]
    lines += [f"**{error}**", ""] if error else []
    if any(file["path"] == REPORT for stage in stages for file in stage.get("files", ())):
        lines += [f"Report: `{REPORT}`, under Artifacts. The stages are child runs.", ""]
    return "\n".join([*lines, ", ".join(f"{package} {version}" for package, version in versions.items())])


def _table(measured: Mapping[str, float]) -> list[str]:
    rows = []
    for key, name in (("top1", "top-1"), *_COSTS):
        pair = [measured.get(f"{model}.{key}") for model in ("dense", "pruned")]
        cells = [f"{value:.2f} %" if key == "top1" else amount(value) for value in pair if value is not None]
        if len(cells) == len(pair):
            rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return ["| | dense | pruned |", "| --- | ---: | ---: |", *rows, ""] if rows else []
