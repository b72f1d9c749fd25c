"""The record of a sweep in MLflow: one run above those of its runs, with its plan, its table and its picture."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vitprune.orchestration.execution.run_stage import environment

STATUS = {"finished": "FINISHED", "killed": "KILLED"}


def record(project: Path, folder: Path, out: Path, warn: Callable[..., None], ended: str = "") -> None:
    """Bring the sweep's run up to date, in a process of its own whose failure costs the sweep nothing."""
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-m",
        "vitprune.orchestration.tracking.sweep_run",
        str(project),
        str(folder),
        str(out),
    ]
    command += ["--ended", ended] if ended else []
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        warn("MLflow was not reached (%s)", (done.stderr.strip().splitlines() or ["?"])[-1][:160])


def put(project: Path, folder: Path, out: Path, ended: str) -> None:
    """Mirror what the runs could not, and make or bring up to date the run above them.

    Doing it twice changes nothing; the run is found again by its key.

    Raises:
        MlflowException: the server does not answer, or refuses.
    """
    from mlflow.entities import Param, RunTag

    from vitprune.orchestration.tracking.replay import replay
    from vitprune.orchestration.tracking.store import open_client, short_patience, tracking_uri
    from vitprune.orchestration.tracking.upload import KEY

    plan = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(project))  # for the runs as well
    client, experiment = open_client(project)  # before any run: the first use of a store is not safe among several
    with short_patience(60):
        for run in plan["runs"]:
            if (folder / run["place"] / ".vitprune/journal").is_dir():
                replay(folder / run["place"])
        tags = {KEY: plan["key"], "mlflow.runName": folder.name, "mlflow.source.name": "vitprune-sweep"}
        tags |= {"vitprune.sweep": folder.name, "vitprune.project": str(project)}
        found = client.search_runs([experiment], f"tags.`{KEY}` = '{plan['key']}'", max_results=1)
        one = found[0] if found else client.create_run(experiment, int(time.time() * 1000), tags, folder.name)
        facts = {"title": plan["title"], "against": plan["against"], "runs": len(plan["runs"])}
        params = [Param(name, str(value)) for name, value in facts.items()]
        client.log_batch(one.info.run_id, params=params, tags=[RunTag(name, value) for name, value in tags.items()])
        if not ended:
            client.update_run(one.info.run_id, "RUNNING")
            return
        for path in sorted(out.glob("*.*")):
            client.log_artifact(one.info.run_id, str(path))
        client.set_terminated(one.info.run_id, STATUS[ended])


def main() -> None:
    """Run as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("project", "folder", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ended", default="")
    options = parser.parse_args()
    from mlflow.exceptions import MlflowException

    try:
        put(options.project, options.folder, options.out, options.ended)
    except (MlflowException, OSError) as error:
        sys.exit((str(error).strip().splitlines() or [type(error).__name__])[0])


if __name__ == "__main__":
    main()
