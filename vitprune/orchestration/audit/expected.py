"""What MLflow has to hold for a journal: the mirror is run once more, into a collector instead of a server."""

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
class Content:
    """What a run of MLflow holds: tags, params, points of metrics (name, step, value), digests of files, and its id."""

    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: set[tuple[str, int, float]] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)
    run: str = ""


@dataclass
class Collector:
    """Takes the place of a client of MLflow for the mirror; `computed_by`: what cached stages came from, by digest."""

    computed_by: Mapping[str, Mapping[str, str]]
    runs: dict[str, Content] = field(default_factory=dict)
    asked: str = ""

    def search_runs(self, experiments: Sequence[str], wanted: str, **options: Any) -> list[Any]:
        """Find nothing by key, as everything is new; by the digest of a stage, the run that computed it."""
        if f"tags.`{KEY}`" in wanted:
            return []
        digest = wanted.split("'")[1]
        known = self.computed_by.get(digest)
        if known is None:
            return []
        info = SimpleNamespace(run_id=known["run"])
        return [SimpleNamespace(info=info, data=SimpleNamespace(tags={KEY: known["key"]}))]

    def create_run(self, experiment: str, started: int, tags: Mapping[str, str], name: str) -> Any:
        """Begin to collect a run, whose id is its key."""
        self.runs[tags[KEY]] = Content(tags=dict(tags))
        return SimpleNamespace(info=SimpleNamespace(run_id=tags[KEY]))

    def log_batch(
        self, run: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        """Collect metrics, params and tags."""
        content = self.runs[run]
        content.points |= {(metric.key, metric.step, metric.value) for metric in metrics}
        content.params |= {param.key: param.value for param in params}
        content.tags |= {tag.key: tag.value for tag in tags}

    def log_artifact(self, run: str, path: str, folder: str | None = None) -> None:
        """Collect the digest of a file."""
        name = Path(path).name if folder is None else f"{folder}/{Path(path).name}"
        self.runs[run].files[name] = sha256(Path(path))

    def log_text(self, run: str, text: str, name: str) -> None:
        """Leave out the journal, whose digest is a tag."""

    def set_terminated(self, run: str, status: str, ended: int) -> None:
        """Leave out the end of a run."""

    def search_logged_models(self, *given: Any, **options: Any) -> list[Any]:
        """Find nothing, as models are compared by their files."""
        return []

    def create_logged_model(self, *given: Any, **options: Any) -> Any:
        """Make a model that asks for no files."""
        return SimpleNamespace(model_id="", status=LoggedModelStatus.READY)


def expected(journal: RunLog, computed_by: Mapping[str, Mapping[str, str]]) -> dict[str, Content]:
    """Return what MLflow has to hold, run by run, under their keys.

    Raises:
        ValueError: a file of the run is not the one that the journal speaks of.
    """
    collector = Collector(computed_by)
    client: Any = collector
    Uploader(client, "", journal).put()
    return collector.runs


def actual(client: MlflowClient, experiment: str, key: str) -> Content | None:
    """Return what MLflow holds of a run, without its files; None where there is no such run."""
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    if not found:
        return None
    run = found[0]
    points = {
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    }
    return Content(dict(run.data.tags), dict(run.data.params), points, run=run.info.run_id)
