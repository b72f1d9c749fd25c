"""Curves of a training while its stage runs: the times of its epochs, and their metrics in MLflow.

The metrics are in a run of their own, since the records of a stage are written when it has ended. The upload of the
flow's run log deletes it.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.orchestration.execution.isolated import IsolatedCallError, call
from vitprune.orchestration.tracking.journal import CURVES, RunLog, read_log
from vitprune.runtime.files import read_json_lines

if TYPE_CHECKING:
    from mlflow import MlflowClient

LIVE = "vitprune.live"  # tag: id of the flow run
POLL, INTERVAL = 1.0, 60.0  # seconds between looks at the curve, and between uploads, which load MLflow
NOTE = "Training curves of the stage that runs now. This run is deleted when the records of the flow run are complete."


@contextmanager
def follow(project: Path, flow_run_id: str, stage: str) -> Iterator[list[float]]:
    """Follow the curve of a stage, and log it to MLflow once a minute.

    Yields:
        The time at which each epoch was recorded, in seconds since 1970; it grows while the stage runs.
    """
    times: list[float] = []
    if stage not in CURVES:
        yield times
        return
    stop = threading.Event()
    arguments = (stop, project, flow_run_id, stage, times)
    thread = threading.Thread(target=_follow, args=arguments, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


def _follow(stop: threading.Event, project: Path, flow_run_id: str, stage: str, times: list[float]) -> None:
    path, started = project / CURVES[stage], time.time()
    upload, logged, last = threading.Thread(), 0, started
    running = True
    while running:
        running = not stop.wait(POLL)
        now, rows = time.time(), _rows(path, started)
        del times[rows:]  # a repeated stage begins again
        times += [now] * (rows - len(times))
        if running and rows != logged and now - last >= INTERVAL and not upload.is_alive():
            texts = (str(project), flow_run_id, stage, json.dumps(times))
            upload = threading.Thread(target=_upload, args=(project, texts), daemon=True)
            upload.start()
            logged, last = rows, now


def _rows(path: Path, started: float) -> int:
    """Return the number of complete rows of a curve; 0 if its file is older than the start of the stage."""
    try:
        return path.read_bytes().count(b"\n") if path.stat().st_mtime >= started else 0
    except OSError:
        return 0


def _upload(project: Path, arguments: tuple[str, ...]) -> None:
    with suppress(IsolatedCallError):  # the records of the stage have the curve when it has ended
        call("vitprune.orchestration.tracking.live_curves:log_curve", *arguments, project=project)


def log_curve(project_path: str, flow_run_id: str, stage: str, times: str) -> int:
    """Log those epochs of a running stage that MLflow does not have yet; return their number.

    Args:
        project_path: The project's directory.
        flow_run_id: Id of the flow run.
        stage: Name of the stage.
        times: The time of each epoch, as a JSON list.
    """
    from mlflow.entities import Metric

    from vitprune.orchestration.tracking.replay import upload_lock
    from vitprune.orchestration.tracking.store import open_client, short_timeouts

    project = Path(project_path)
    run_log = RunLog(project, flow_run_id)
    with upload_lock(project):
        if not run_log.path.is_file() or any(fact["fact"] == "end" for fact in read_log(run_log.path)):
            return 0  # the flow has ended
        rows = read_json_lines(project / CURVES[stage])
        client, experiment = open_client(project)
        with short_timeouts(15):
            run = _live_run(client, experiment, flow_run_id)
            first = len(client.get_metric_history(run, f"{stage}.loss"))
            new = list(zip(rows, json.loads(times), strict=False))[first:]
            points = [
                Metric(f"{stage}.{name}", float(value), int(seconds * 1000), first + number)
                for number, (row, seconds) in enumerate(new)
                for name, value in row.items()
                if isinstance(value, int | float) and name != "step"
            ]
            client.log_batch(run, points)
    return len(new)


def _live_run(client: "MlflowClient", experiment: str, flow_run_id: str) -> str:
    """Return the run with the live curves of a flow run; create it if there is none."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    from vitprune.orchestration.tracking.store import find_run

    run, name = find_run(client, experiment, LIVE, flow_run_id), f"compress-{flow_run_id[:8]} (running)"
    run = run or client.create_run(experiment, tags={LIVE: flow_run_id, MLFLOW_RUN_NOTE: NOTE}, run_name=name)
    return str(run.info.run_id)


def delete_live_run(client: "MlflowClient", experiment: str, flow_run_id: str) -> None:
    """Delete the run with the live curves of a flow run, if there is one."""
    for run in client.search_runs([experiment], f"tags.`{LIVE}` = '{flow_run_id}'"):
        client.delete_run(run.info.run_id)
