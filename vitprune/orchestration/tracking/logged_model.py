"""The final model as a logged model of MLflow 3: safetensors, config.json, and MLmodel, by which MLflow serves it."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus

from vitprune.runtime.files import read_json

MLMODEL = "MLmodel"
LOADER = {"loader_module": "vitprune.models.pyfunc"}
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
        config = next((spool / file["path"] for file in files if file["path"].endswith("config.json")), None)
        if config is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / MLMODEL
                path.write_text(mlmodel(config), encoding="utf-8")
                client.log_model_artifact(model.model_id, str(path))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def mlmodel(config: Path) -> str:
    """Return the file MLmodel of a saved model: how MLflow loads it, and the shape of the images from its config.json.

    It has neither a date nor a version, so that an audit can compare it.
    """
    content: dict[str, Any] = {"flavors": {"python_function": LOADER}}
    size = (read_json(config).get("pretrained_cfg") or {}).get("input_size")
    if size is not None:
        content["signature"] = {"inputs": _tensor([-1, *size]), "outputs": _tensor([-1, -1])}
    return yaml.safe_dump(content, sort_keys=True)


def _tensor(shape: list[int]) -> str:
    return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": shape}}])


def find_model(client: MlflowClient, experiment: str, tag: str, value: str) -> LoggedModel | None:
    """Return the first logged model with a tag, or None."""
    models = client.search_logged_models([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
    return models[0] if models else None


def model_digest(files: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the SHA-256 of the weights among a model's files, or None."""
    return next((file["sha256"] for file in files if file["path"].endswith("model.safetensors")), None)
