"""Prefect artifacts of a flow run: a Markdown report, a table of sparsity per layer, a link to the MLflow run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from vitprune.orchestration.summary import rows
from vitprune.orchestration.tracking.replay import UploadResult
from vitprune.pipeline.report.inputs import read_evaluation
from vitprune.runtime.messages import first_line

CLASSIC_VIEW = "workflowType=machine_learning"


def publish(
    project: Path, upload: UploadResult, stages: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
) -> None:
    """Publish all artifacts; a failure is a warning."""
    try:
        create_markdown_artifact(markdown(project, stages), key="report", description="Dense and pruned model")
        if table := sparsity(project):
            create_table_artifact(table, key="sparsity", description="Sparsity of every layer after the last cycle")
        if upload.run_id:
            create_link_artifact(link(upload), "The run in MLflow", key="mlflow", description=how_to_open(upload))
    except Exception as error:  # the artifacts are optional: a Prefect server that rejects them is no failure
        warn(f"artifacts were not published: {first_line(error)}")


def markdown(project: Path, stages: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy and costs of the dense and the pruned model, and the stages' times, as Markdown."""
    lines = ["# Dense and pruned model", ""]
    measured = read_evaluation(project / "metrics")
    if measured is not None:
        lines += ["| | dense | pruned |", "|---|---:|---:|"]
        lines += [f"| {name} | {dense} | {pruned} |" for name, dense, pruned in rows(measured)]
    lines += ["", "| stage | | seconds |", "|---|---|---:|"]
    for stage in stages:
        status = "failed" if stage["exit_code"] else "cached" if stage["cached"] else "ran"
        lines.append(f"| {stage['stage']} | {status} | {stage['seconds']:.1f} |")
    lines += [f"\n**{stage['error']}**" for stage in stages if stage["error"]]
    return "\n".join(lines)


def sparsity(project: Path) -> list[dict[str, Any]]:
    """Return the sparsity after the last cycle, one row per group."""
    tables = sorted((project / "out/cycles").glob("[0-9]*/sparsity.parquet"))
    return pq.read_table(tables[-1]).to_pylist() if tables else []


def link(upload: UploadResult) -> str:
    """Return the URL of the run in MLflow's user interface; for a local store that of a server still to be started.

    Without the query, MLflow 3 opens its view for GenAI, which lists the run under evaluations and has no models.
    """
    server = upload.uri if upload.uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server.rstrip('/')}/#/experiments/{upload.experiment_id}/runs/{upload.run_id}?{CLASSIC_VIEW}"


def how_to_open(upload: UploadResult) -> str:
    """Return the description of the link: how to start a server for a local store."""
    if upload.uri.startswith("http"):
        return "The parent run, with a child run for every stage and pruning cycle."
    return f"Start `mlflow server --backend-store-uri {upload.uri}` first."
