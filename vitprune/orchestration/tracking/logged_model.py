"""The final model as a logged model of MLflow 3: safetensors and config.json."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus

KEY, DIGEST = "vitprune.key", "vitprune.model_sha256"


def record_model(
    client: MlflowClient, experiment: str, run: str, key: str, spool: Path, files: Iterable[Mapping[str, Any]]
) -> str:
    """Log the files of a model, once for every key.

    Args:
        client: Client of the tracking store.
        experiment: Id of the experiment.
        run: Run that has computed the model.
        key: Key of that run.
        spool: Directory of the files.
        files: Paths and checksums of the files, as in the run log.

    Returns:
        Id of the logged model.
    """
    files = list(files)
    model = find_model(client, experiment, KEY, key)
    if model is None:
        tags = {KEY: key, DIGEST: model_digest(files) or ""}
        model = client.create_logged_model(experiment, "vitprune", run, tags, model_type="timm")
    if model.status != LoggedModelStatus.READY:
        for file in files:
            client.log_model_artifact(model.model_id, str(spool / file["path"]))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def find_model(client: MlflowClient, experiment: str, tag: str, value: str) -> LoggedModel | None:
    """Return the first logged model with a tag, or None."""
    models = client.search_logged_models([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
    return models[0] if models else None


def model_digest(files: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the SHA-256 of the weights among a model's files, or None."""
    return next((file["sha256"] for file in files if file["path"].endswith("model.safetensors")), None)
