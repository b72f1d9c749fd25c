"""What a flow run shows in Prefect: a Markdown report, a table of sparsity per layer, a link to the run of MLflow."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from vitprune.orchestration.summary import evaluation, rows
from vitprune.orchestration.tracking.replay import UploadResult


def publish(
    project: Path, mirrored: UploadResult, stages: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
) -> None:
    """Publish what the finished stages left; a Prefect server that refuses costs the run nothing."""
    try:
        create_markdown_artifact(markdown(project, stages), key="report", description="Dense against pruned")
        if table := sparsity(project):
            create_table_artifact(table, key="sparsity", description="Sparsity of every layer after the last cycle")
        if mirrored.run_id:
            create_link_artifact(link(mirrored), "The run in MLflow", key="mlflow", description=how_to_open(mirrored))
    except Exception as error:  # whatever a server or the way to it may raise: the stages' work is done
        warn(f"artifacts were not published: {(str(error).splitlines() or [type(error).__name__])[0]}")


def markdown(project: Path, stages: Sequence[Mapping[str, Any]]) -> str:
    """Return the comparison of the dense and the pruned model and the stages' times as Markdown."""
    lines = ["# Dense against pruned", ""]
    measured = evaluation(project)
    if measured is not None:
        lines += ["| | dense | pruned |", "|---|---:|---:|"]
        lines += [f"| {name} | {dense} | {pruned} |" for name, dense, pruned in rows(measured)]
    lines += ["", "| stage | | seconds |", "|---|---|---:|"]
    for stage in stages:
        how = "failed" if stage["exit_code"] else "cached" if stage["cached"] else "ran"
        lines.append(f"| {stage['stage']} | {how} | {stage['seconds']:.1f} |")
    lines += [f"\n**{stage['error']}**" for stage in stages if stage["error"]]
    return "\n".join(lines)


def sparsity(project: Path) -> list[dict[str, Any]]:
    """Return the sparsity of every layer after the last cycle, one row a group."""
    tables = sorted((project / "out/cycles").glob("[0-9]*/sparsity.parquet"))
    return pq.read_table(tables[-1]).to_pylist() if tables else []


def link(mirrored: UploadResult) -> str:
    """Return the address of the run in MLflow's pages; a local store has none until a server is started on it."""
    server = mirrored.uri if mirrored.uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server.rstrip('/')}/#/experiments/{mirrored.experiment_id}/runs/{mirrored.run_id}"


def how_to_open(mirrored: UploadResult) -> str:
    """Return what to do before the link works."""
    if mirrored.uri.startswith("http"):
        return "The parent run, with a child for every stage and pruning cycle."
    return f"Start `mlflow server --backend-store-uri {mirrored.uri}` first."
