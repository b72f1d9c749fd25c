"""MLflow's model registry: challengers as versions, the alias `champion`, promotion and rollback."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from vitprune.errors import BadInput
from vitprune.orchestration.tracking.logged_model import KEY, find_model
from vitprune.orchestration.tracking.store import find_run, open_client

CHAMPION = "champion"
REFUSED = re.compile(r"['\"`/:]")  # characters that MLflow does not take in the name of a model or in a filter
VERSION_OF_DATA, PASSED, BEFORE = "vitprune.data_version", "vitprune.passed", "vitprune.champion_before"


class RegistryError(BadInput):
    """The registry has no such run or version; one line that says what to do."""


@dataclass(frozen=True)
class Registry:
    """The versions of one registered model."""

    client: MlflowClient
    experiment: str
    name: str

    def champion(self) -> ModelVersion | None:
        """Return the version with the alias champion, or None."""
        try:
            return self.client.get_model_version_by_alias(self.name, CHAMPION)
        except MlflowException:
            return None

    def version_of_data(self, data_version: str) -> ModelVersion | None:
        """Return the version, promoted or not, that was trained on a version of the data, or None."""
        return next((v for v in self.versions() if v.tags.get(VERSION_OF_DATA) == data_version), None)

    def versions(self) -> list[ModelVersion]:
        """Return all versions, the newest first."""
        versions = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        return sorted(versions, key=lambda version: int(version.version), reverse=True)

    def download(self, version: ModelVersion, folder: Path) -> Path:
        """Download the files of a version into a folder, and return their folder."""
        from mlflow.artifacts import download_artifacts

        folder.mkdir(parents=True, exist_ok=True)
        uri = self.client.get_model_version_download_uri(self.name, version.version)
        tracking = self.client.tracking_uri
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=tracking))

    def add(self, run: str, flow_run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Register the model of a flow run as a new version.

        Raises:
            RegistryError: MLflow has no model of the run.
        """
        key = self._model_key(flow_run_id)
        model = find_model(self.client, self.experiment, KEY, key)
        if model is None:
            raise RegistryError(f"run {run}: MLflow has no logged model of it; run `vitprune sync`, then retrain again")
        try:
            self.client.get_registered_model(self.name)
        except MlflowException:
            self.client.create_registered_model(self.name)
        return self.client.create_model_version(
            self.name, f"models:/{model.model_id}", run, tags=dict(tags), model_id=model.model_id
        )

    def promote(self, version: ModelVersion) -> None:
        """Set the alias champion to a version, and record the former champion in a tag."""
        before = self.champion()
        if before is not None:
            self.client.set_model_version_tag(self.name, version.version, BEFORE, before.version)
        self.client.set_registered_model_alias(self.name, CHAMPION, version.version)

    def roll_back(self) -> tuple[str, str]:
        """Set the alias champion back to the former champion; return the old and the new champion's version.

        Raises:
            RegistryError: there is no champion, or no former one.
        """
        current = self.champion()
        if current is None:
            raise RegistryError(f"{self.name}: no version is champion, so there is nothing to roll back")
        before = current.tags.get(BEFORE)
        if before is None:
            raise RegistryError(
                f"{self.name}: version {current.version} is the first champion; there is no former one to roll back to"
            )
        self.client.set_registered_model_alias(self.name, CHAMPION, before)
        return str(current.version), str(before)

    def _model_key(self, flow_run_id: str) -> str:
        """Return the key of the logged model: for a cached stage that of the run that computed it."""
        stage = f"{flow_run_id}/distill"
        stage_run = find_run(self.client, self.experiment, KEY, stage)
        source = stage_run.data.tags.get("vitprune.computed_by") if stage_run else None
        return str(self.client.get_run(source).data.tags[KEY]) if source else stage


def registry(project: Path, name: str | None = None) -> Registry:
    """Open the registered model of a project: `name`, else VITPRUNE_MODEL_NAME, else the name of the project's folder.

    Quotes, / and :, which MLflow does not take, become - in the name of a folder.

    Raises:
        BadInput: `name` or VITPRUNE_MODEL_NAME has such a character.
        MlflowException: the server does not answer, or rejects the request.
    """
    given = name or os.environ.get("VITPRUNE_MODEL_NAME")
    if given and REFUSED.search(given):
        raise BadInput(f"model name {given!r}: MLflow takes no quotes, / and : in it; give another one")
    client, experiment = open_client(project)
    return Registry(client, experiment, given or REFUSED.sub("-", project.name))
