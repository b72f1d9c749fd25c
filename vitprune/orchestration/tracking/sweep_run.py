"""The MLflow run of a sweep: the parent of its runs, with plan, table and Pareto plot."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from vitprune.orchestration.execution.isolated import IsolatedCallError, call
from vitprune.runtime.files import read_json
from vitprune.runtime.untrusted import without_credentials

STATUS = {"finished": "FINISHED", "killed": "KILLED"}


def record(project: Path, folder: Path, out: Path, warn: Callable[..., None], status: str = "running") -> None:
    """Create or update the sweep's MLflow run in a new process; a failure is a warning.

    Args:
        project: The project's directory.
        folder: The sweep's folder, with sweep.json.
        out: Folder of the table and the plot.
        warn: Called with a format string and the reason of a failure.
        status: "running", "finished" or "killed".
    """
    function = "vitprune.orchestration.tracking.sweep_run:upload_sweep"
    try:
        call(function, str(project), str(folder), str(out), status, project=folder)
    except IsolatedCallError as error:
        warn("MLflow was not reached (%s)", without_credentials(str(error))[:160])


def upload_sweep(project_path: str, folder_path: str, out_path: str, status: str) -> None:
    """Upload the run logs of a sweep's runs that MLflow does not have, and create or update their parent; idempotent.

    Raises:
        MlflowException: the server does not answer, or rejects the request.
    """
    project, folder, out = Path(project_path), Path(folder_path), Path(out_path)
    from mlflow.entities import Param, RunTag

    from vitprune.orchestration.tracking.logged_model import KEY
    from vitprune.orchestration.tracking.replay import replay
    from vitprune.orchestration.tracking.store import find_run, open_client, short_timeouts, tracking_uri

    plan = read_json(folder / "sweep.json")
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(project))  # for replay too
    client, experiment = open_client(project)  # before any run: creating a store is not safe among several processes
    with short_timeouts(60):
        for run in plan["runs"]:
            if (folder / run["directory"] / ".vitprune/journal").is_dir():
                replay(folder / run["directory"])
        tags = {KEY: plan["key"], "mlflow.runName": folder.name, "mlflow.source.name": "vitprune sweep"}
        tags |= {"vitprune.sweep": folder.name, "vitprune.project": str(project)}
        parent = find_run(client, experiment, KEY, plan["key"])
        parent = parent or client.create_run(experiment, int(time.time() * 1000), tags, folder.name)
        facts = {"title": plan["title"], "against": plan["against"], "runs": len(plan["runs"])}
        params = [Param(name, str(value)) for name, value in facts.items()]
        client.log_batch(parent.info.run_id, params=params, tags=[RunTag(name, value) for name, value in tags.items()])
        if status not in STATUS:
            client.update_run(parent.info.run_id, "RUNNING")
            return
        for path in sorted(out.glob("*.*")):
            client.log_artifact(parent.info.run_id, str(path))
        client.set_terminated(parent.info.run_id, STATUS[status])
