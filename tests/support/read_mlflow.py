"""Print all runs and logged models of an MLflow store as JSON: read_mlflow.py URI.

It runs in a separate process, since MLflow emits warnings, which pytest treats as errors.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient

from vitprune.runtime.files import sha256


def files(client: MlflowClient, run: str, folder: str | None = None) -> Iterator[str]:
    """Yield the paths of all artifacts of a run."""
    for file in client.list_artifacts(run, folder):
        yield from files(client, run, file.path) if file.is_dir else [file.path]


def main() -> None:
    client, runs = MlflowClient(tracking_uri=sys.argv[1]), []
    experiment = client.get_experiment_by_name("vitprune").experiment_id
    for run in client.search_runs([experiment], max_results=1000):
        names, into = list(files(client, run.info.run_id)), tempfile.mkdtemp()
        digests = {name: sha256(Path(client.download_artifacts(run.info.run_id, name, into))) for name in names}
        facts = {"id": run.info.run_id, "name": run.data.tags["mlflow.runName"], "status": run.info.status}
        facts |= {"tags": run.data.tags, "datasets": [used.dataset.name for used in run.inputs.dataset_inputs]}
        runs.append(facts | {"params": run.data.params, "metrics": run.data.metrics, "files": digests})
    models = []
    for model in client.search_logged_models([experiment]):
        names = [file.path for file in client.list_logged_model_artifacts(model.model_id)]
        metrics = {metric.key: metric.value for metric in model.metrics}
        models.append({"status": str(model.status), "files": names, "tags": model.tags, "metrics": metrics})
    print(json.dumps({"runs": runs, "models": models, "kind": client.get_experiment(experiment).tags}))


if __name__ == "__main__":
    main()
