"""Compare the logged model of a run in MLflow, and its registered versions, with the run's files."""

from collections.abc import Iterator
from pathlib import Path

from vitprune.orchestration.audit.collect import CollectedRun
from vitprune.orchestration.tracking.journal import CHECKPOINT, MODEL
from vitprune.orchestration.tracking.logged_model import DIGEST, KEY, MLMODEL, mlmodel
from vitprune.runtime.files import sha256
from vitprune.runtime.messages import Note


def logged_model(collected: CollectedRun) -> Iterator[str]:
    """Compare the logged model of the run in MLflow, and its registered versions, with the run's files."""
    run, client, folder = collected.stages["distill"], collected.client, collected.scratch / "model"
    experiment, key = run.info.experiment_id, run.data.tags[KEY]
    models = client.search_logged_models([experiment], f"tags.`{KEY}` = '{key}'", max_results=10)
    evaluated = collected.stage_fact("evaluate").get("metrics", {})
    if len(models) != 1:
        yield f"distill: MLflow has {len(models) or 'no'} logged models of this run; there must be one"
    for model in models:
        folder.mkdir(exist_ok=True)
        for name in CHECKPOINT:
            local, logged = collected.tree / MODEL / name, _model_file(collected, model.model_id, name, folder)
            if logged is None or sha256(logged) != sha256(local):
                yield f"{name}: differs between MLflow's model {model.model_id} and {MODEL}"
        if model.tags.get(DIGEST) != sha256(collected.tree / MODEL / "model.safetensors"):
            yield f"model {model.model_id}: tag {DIGEST} is not the sha256 of {MODEL}/model.safetensors"
        if model.source_run_id != run.info.run_id:
            yield f"model {model.model_id}: MLflow names the run {model.source_run_id} as its source"
        for metric in model.metrics or ():
            value = evaluated.get(metric.key)
            if value is not None and float(value) == metric.value:
                continue
            if metric.run_id in (None, collected.parent.info.run_id):
                yield f"model {model.model_id}: {metric.key} is {metric.value} in MLflow, {value} in the run log"
            else:  # a run with the same weights may have measured them, too
                yield Note(f"model {model.model_id}: {metric.key} {metric.value} was logged by the run {metric.run_id}")
        yield from _serving(collected, model.model_id, folder)
        for file in client.list_logged_model_artifacts(model.model_id):
            if file.path not in (*CHECKPOINT, MLMODEL):
                yield Note(f"model {model.model_id}: the file {file.path} is in MLflow only")
    known = {f"models:/{model.model_id}" for model in models}
    for version in client.search_model_versions(f"run_id = '{collected.parent.info.run_id}'"):
        if version.source not in known:
            yield f"{version.name}: version {version.version} names this run, but has the model {version.source}"


def _serving(collected: CollectedRun, model: str, folder: Path) -> Iterator[str]:
    """Compare MLmodel, which names the code that MLflow runs to serve the model, with what vitprune writes."""
    logged = _model_file(collected, model, MLMODEL, folder)
    if logged is None:
        yield Note(f"model {model}: MLflow cannot serve it; it was recorded without {MLMODEL}")
    elif logged.read_text(encoding="utf-8", errors="replace") != mlmodel(collected.tree / MODEL / "config.json"):
        yield f"{MLMODEL}: of MLflow's model {model} differs from the one that is written for {MODEL}"


def _model_file(collected: CollectedRun, model: str, name: str, folder: Path) -> Path | None:
    from mlflow.artifacts import download_artifacts

    uri = f"{collected.client.get_logged_model(model).artifact_location}/{name}"
    try:
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except Exception:  # every artifact store raises its own error for a missing file
        return None
