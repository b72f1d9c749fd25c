"""A copy of the model registry in the project, from which versions that MLflow has lost are registered again."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from vitprune.errors import BadInput
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.tracking.logged_model import KEY, find_model
from vitprune.orchestration.tracking.registry import CHAMPION, Registry, registry
from vitprune.orchestration.tracking.store import find_run
from vitprune.runtime.files import read_optional_json, write_json

COPY, MODELS = STATE / "registry.json", "models:/"
Entry = dict[str, Any]  # version, run_id, run (key of the flow run), model (key of the logged model), tags


def keep_copy(project: Path, models: Registry) -> None:
    """Write the versions of a model and its champion into the project; no effect if MLflow has no version."""
    versions, champion = models.versions(), models.champion()
    if not versions:
        return
    copy = _read(project)
    known = {(entry["version"], entry["run_id"]): entry for entry in copy.get(models.name, {}).get("versions", ())}
    entries = []
    for version in reversed(versions):
        number = str(version.version)
        keys = known.get((number, version.run_id)) or _keys(models.client, version)
        entries.append({**keys, "version": number, "run_id": version.run_id, "tags": dict(version.tags)})
    copy[models.name] = {"versions": entries, "champion": None if champion is None else str(champion.version)}
    write_json(project / COPY, copy)


def lost_versions(project: Path, models: Registry) -> list[Entry]:
    """Return the versions in the project's copy, oldest first, if MLflow has lost them together with their runs.

    A registered model that a user has deleted is not lost: MLflow still has the runs of its versions.
    """
    entries: list[Entry] = _read(project).get(models.name, {}).get("versions", [])
    if not entries or models.versions() or _run(models.client, entries[-1]["run_id"]):
        return []
    return entries


def refuse_lost(project: Path, models: Registry) -> None:
    """Refuse to go on without the versions that MLflow has lost.

    Raises:
        BadInput: MLflow has lost them; how to register them again.
    """
    if lost := lost_versions(project, models):
        raise BadInput(
            f"{models.name}: MLflow has lost {len(lost)} version{'' if len(lost) == 1 else 's'}; run `vitprune sync "
            f"--project {project}`, which registers them again"
        )


def restore_versions(project: Path) -> tuple[int, list[str]]:
    """Register the versions again that MLflow has lost, with their numbers, tags and champion, and update the copy.

    Call it after the runs were uploaded again.

    Returns:
        The number of versions, and a line for each that cannot be registered, since its run is lost.
    """
    done, reasons = 0, list[str]()
    for name in {registry(project).name: None, **_read(project)}:
        models = registry(project, name)
        lost = lost_versions(project, models)
        if lost:
            champion = _read(project)[name]["champion"]
            missed = _register(models, lost, champion)
            done += len(lost) - len(missed)
            reasons += [f"{name}: version {number} is lost, with its run" for number in missed]
        keep_copy(project, models)
    return done, reasons


def _register(models: Registry, entries: list[Entry], champion: str | None) -> list[str]:
    """Register versions under their numbers; return the numbers of those whose model is lost."""
    client, missed, last = models.client, list[str](), 0
    sources = {entry["version"]: _source(models, entry) for entry in entries}
    available = [source for source in sources.values() if source is not None]
    if not available:
        return list(sources)
    client.create_registered_model(models.name)
    for entry in entries:
        source = sources[entry["version"]]
        while last < int(entry["version"]) - (source is not None):  # MLflow counts versions that were deleted
            run, model = available[0]
            filler = client.create_model_version(models.name, f"{MODELS}{model}", run, model_id=model)
            client.delete_model_version(models.name, filler.version)
            last = int(filler.version)
        if source is None:
            missed.append(entry["version"])
            continue
        run, model = source
        made = client.create_model_version(models.name, f"{MODELS}{model}", run, tags=entry["tags"], model_id=model)
        last = int(made.version)
    if champion is not None and champion not in missed:
        client.set_registered_model_alias(models.name, CHAMPION, champion)
    return missed


def _source(models: Registry, entry: Entry) -> tuple[str, str] | None:
    """Return the ids of the run and of the logged model of a version, or None."""
    run = find_run(models.client, models.experiment, KEY, entry["run"])
    model = find_model(models.client, models.experiment, KEY, entry["model"])
    return (str(run.info.run_id), str(model.model_id)) if run and model else None


def _keys(client: MlflowClient, version: ModelVersion) -> dict[str, str]:
    """Return the tags by which the run and the logged model of a version are found again; empty if there is none."""
    run, source = _run(client, version.run_id), str(version.source)
    model = client.get_logged_model(source.removeprefix(MODELS)) if run and source.startswith(f"{MODELS}m-") else None
    return {"run": run.data.tags.get(KEY, "") if run else "", "model": model.tags.get(KEY, "") if model else ""}


def _run(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _read(project: Path) -> dict[str, Any]:
    path = project / COPY
    try:
        return read_optional_json(path) or {}
    except BadInput as error:
        raise BadInput(f"{str(error).partition(';')[0]}; delete it, `vitprune sync` writes it again") from None
