"""MLflow's model registry: challengers as versions, the alias `champion`, and the way back."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from vitprune.orchestration.tracking.logged_model import find_model
from vitprune.orchestration.tracking.upload import KEY

CHAMPION = "champion"
VERSION_OF_DATA, PASSED, BEFORE = "vitprune.data_version", "vitprune.passed", "vitprune.champion_before"


class RegistryFault(Exception):
    """The registry does not have what was asked for; one line that says what to do."""


@dataclass(frozen=True)
class Registry:
    """The versions of one registered model."""

    client: MlflowClient
    experiment: str
    name: str

    def champion(self) -> ModelVersion | None:
        """Return the version in use, or None while there is none."""
        try:
            return self.client.get_model_version_by_alias(self.name, CHAMPION)
        except MlflowException:
            return None

    def tried(self, data_version: str) -> ModelVersion | None:
        """Return the version, promoted or not, that was made of a version of the data."""
        return next((v for v in self.versions() if v.tags.get(VERSION_OF_DATA) == data_version), None)

    def versions(self) -> list[ModelVersion]:
        """Return all versions, the newest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'", max_results=1000)
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def weights_of(self, version: ModelVersion, folder: Path) -> Path:
        """Fetch the files of a version into a folder and return it."""
        from mlflow.artifacts import download_artifacts

        folder.mkdir(parents=True, exist_ok=True)
        uri = self.client.get_model_version_download_uri(self.name, version.version)
        tracking = self.client.tracking_uri
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=tracking))

    def add(self, run: str, flow_run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Make a version of the model that a flow run has left, and tag it.

        Raises:
            RegistryFault: MLflow has no model of the run.
        """
        key = self._model_key(run, flow_run_id)
        model = find_model(self.client, self.experiment, KEY, key)
        if model is None:
            raise RegistryFault(
                f"run {run}: MLflow has no model of it; run `vitprune-track replay`, then retrain again"
            )
        try:
            self.client.get_registered_model(self.name)
        except MlflowException:
            self.client.create_registered_model(self.name)
        return self.client.create_model_version(
            self.name, f"models:/{model.model_id}", run, tags=dict(tags), model_id=model.model_id
        )

    def promote(self, version: ModelVersion) -> None:
        """Give a version the alias, and note whose place it took."""
        before = self.champion()
        if before is not None:
            self.client.set_model_version_tag(self.name, version.version, BEFORE, before.version)
        self.client.set_registered_model_alias(self.name, CHAMPION, version.version)

    def roll_back(self) -> tuple[str, str]:
        """Give the alias back to the champion before; the versions that lost and got it.

        Raises:
            RegistryFault: there is no champion, or it is the first.
        """
        now = self.champion()
        if now is None:
            raise RegistryFault(f"{self.name}: has no champion; nothing to roll back")
        before = now.tags.get(BEFORE)
        if before is None:
            raise RegistryFault(f"{self.name}: version {now.version} is the first champion; nothing to roll back to")
        self.client.set_registered_model_alias(self.name, CHAMPION, before)
        return str(now.version), str(before)

    def _model_key(self, run: str, flow_run_id: str) -> str:
        """The key of the model's record: that of the run that computed it, where DVC had it already."""
        stage = f"{flow_run_id}/distill"
        found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{stage}'", max_results=1)
        source = found[0].data.tags.get("vitprune.computed_by") if found else None
        return str(self.client.get_run(source).data.tags[KEY]) if source else stage


def registry(project: Path, name: str | None = None) -> Registry:
    """Open the registry of a project's models, under the name given, VITPRUNE_MODEL_NAME or the project's own.

    Raises:
        MlflowException: the server does not answer, or refuses.
    """
    from vitprune.orchestration.tracking.store import open_client

    client, experiment = open_client(project)
    return Registry(client, experiment, name or os.environ.get("VITPRUNE_MODEL_NAME") or project.name)
