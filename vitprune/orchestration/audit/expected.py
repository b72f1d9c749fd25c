"""Expected MLflow records of a run log: the upload is repeated into a recorder instead of a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag

from vitprune.orchestration.tracking.journal import RunLog
from vitprune.orchestration.tracking.upload import KEY, Uploader
from vitprune.runtime.files import sha256


@dataclass
class RunContent:
    """Content of an MLflow run: tags, params, metric points (name, step, value), SHA-256 of files, id of the run."""

    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: set[tuple[str, int, float]] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)
    run: str = ""


@dataclass
class RecordingClient:
    """Has the methods of MlflowClient that the upload calls, and records their arguments.

    `computed_by` has the run and key of the stage that computed a cached one, by the hash of its entry in dvc.lock.
    """

    computed_by: Mapping[str, Mapping[str, str]]
    runs: dict[str, RunContent] = field(default_factory=dict)

    def search_runs(self, experiments: Sequence[str], wanted: str, **options: Any) -> list[Any]:
        """Return no run for a key, as all are new; for the hash of a stage, the run that computed it."""
        if f"tags.`{KEY}`" in wanted:
            return []
        digest = wanted.split("'")[1]
        source = self.computed_by.get(digest)
        if source is None:
            return []
        info = SimpleNamespace(run_id=source["run"])
        return [SimpleNamespace(info=info, data=SimpleNamespace(tags={KEY: source["key"]}))]

    def create_run(self, experiment: str, started: int, tags: Mapping[str, str], name: str) -> Any:
        """Record a new run; its id is its key."""
        self.runs[tags[KEY]] = RunContent(tags=dict(tags))
        return SimpleNamespace(info=SimpleNamespace(run_id=tags[KEY]))

    def log_batch(
        self, run: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        """Record metrics, params and tags."""
        content = self.runs[run]
        content.points |= {(metric.key, metric.step, metric.value) for metric in metrics}
        content.params |= {param.key: param.value for param in params}
        content.tags |= {tag.key: tag.value for tag in tags}

    def log_artifact(self, run: str, path: str, folder: str | None = None) -> None:
        """Record the SHA-256 of a file."""
        name = Path(path).name if folder is None else f"{folder}/{Path(path).name}"
        self.runs[run].files[name] = sha256(Path(path))

    def log_text(self, run: str, text: str, name: str) -> None:
        """Ignore the run log, whose SHA-256 is a tag."""

    def set_terminated(self, run: str, status: str, ended: int) -> None:
        """Ignore the end of a run."""

    def search_logged_models(self, *given: Any, **options: Any) -> list[Any]:
        """Return nothing, as models are compared by their files."""
        return []

    def create_logged_model(self, *given: Any, **options: Any) -> Any:
        """Return a finished model, so that no files are uploaded."""
        return SimpleNamespace(model_id="", status=LoggedModelStatus.READY)


def expected(journal: RunLog, computed_by: Mapping[str, Mapping[str, str]]) -> dict[str, RunContent]:
    """Return the expected content of every MLflow run of a run log.

    Args:
        journal: the run log, with its files in `journal.spool`.
        computed_by: MLflow run ("run") and key ("key") that computed a cached stage, by the hash of its dvc.lock entry.

    Returns:
        Content of every run, by its key (FLOW, FLOW/STAGE or FLOW/STAGE/CYCLE).

    Raises:
        ValueError: a file does not have the SHA-256 of the run log.
    """
    recorder = RecordingClient(computed_by)
    client: Any = recorder
    Uploader(client, "", journal).upload()
    return recorder.runs


def actual(client: MlflowClient, experiment: str, key: str) -> RunContent | None:
    """Return the content of a run in MLflow, without its files; None if there is no such run."""
    runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    if not runs:
        return None
    run = runs[0]
    points = {
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    }
    return RunContent(dict(run.data.tags), dict(run.data.params), points, run=run.info.run_id)
