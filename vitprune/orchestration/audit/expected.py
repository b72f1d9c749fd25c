"""Expected MLflow records of a run log: the upload is repeated into a recorder instead of a server."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LoggedModelStatus, Metric, Param, Run, RunTag

from vitprune.orchestration.tracking.journal import RunLog
from vitprune.orchestration.tracking.logged_model import KEY
from vitprune.orchestration.tracking.upload import Uploader


@dataclass
class RunContent:
    """Content of an MLflow run.

    Attributes:
        tags: tags.
        params: params.
        points: All points of the metrics: name, step, value.
        latest: Value of every metric at its last step, which MLflow's pages and searches show.
        files: Paths of the artifacts.
        datasets: Name and digest of the data sets.
        info: Name, status, start and end (milliseconds since 1970); without an end for a run that others end.
        run: Id of the run.
    """

    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: set[tuple[str, int, float]] = field(default_factory=set)
    latest: dict[str, float] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    datasets: set[tuple[str, str]] = field(default_factory=set)
    info: dict[str, Any] = field(default_factory=dict)
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
        self.runs[tags[KEY]] = RunContent(tags=dict(tags), info={"name": name, "start": started})
        return SimpleNamespace(info=SimpleNamespace(run_id=tags[KEY]))

    def log_batch(
        self, run: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        """Record metrics, params and tags."""
        content = self.runs[run]
        content.points |= {(metric.key, metric.step, metric.value) for metric in metrics}
        last = {key: step for key, step, _ in sorted(content.points, key=lambda point: point[1])}
        content.latest |= {metric.key: metric.value for metric in metrics if metric.step >= last[metric.key]}
        content.params |= {param.key: param.value for param in params}
        content.tags |= {tag.key: tag.value for tag in tags}

    def log_inputs(self, run: str, inputs: Sequence[DatasetInput]) -> None:
        """Record data sets."""
        self.runs[run].datasets |= {(logged.dataset.name, logged.dataset.digest) for logged in inputs}

    def log_artifact(self, run: str, path: str, folder: str | None = None) -> None:
        """Record the path of a file."""
        self.runs[run].files.add(Path(path).name if folder is None else f"{folder}/{Path(path).name}")

    def log_text(self, run: str, text: str, name: str) -> None:
        """Record the name of a text file. The text is the run log, whose SHA-256 is a tag."""
        self.runs[run].files.add(name)

    def set_terminated(self, run: str, status: str, ended: int) -> None:
        """Record status and end of a run."""
        self.runs[run].info |= {"status": status, "end": ended}

    def search_logged_models(self, *given: Any, **options: Any) -> list[Any]:
        """Return nothing, as models are compared by their files."""
        return []

    def create_logged_model(self, *given: Any, **options: Any) -> Any:
        """Return a model that is finished already: then the caller uploads no files."""
        return SimpleNamespace(model_id="", status=LoggedModelStatus.READY)


def expected(journal: RunLog, computed_by: Mapping[str, Mapping[str, str]]) -> dict[str, RunContent]:
    """Return the expected content of every MLflow run of a run log.

    Args:
        journal: The run log, with its files in `journal.spool`.
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


def actual(client: MlflowClient, experiment: str, key: str) -> list[RunContent]:
    """Return the content of all runs in MLflow that have a key; more than one is a forgery."""
    return [_content(client, run) for run in client.search_runs([experiment], f"tags.`{KEY}` = '{key}'")]


def _content(client: MlflowClient, run: Run) -> RunContent:
    info = run.info
    histories = {name: client.get_metric_history(info.run_id, name) for name in run.data.metrics}
    points = {(name, point.step, point.value) for name, history in histories.items() for point in history}
    return RunContent(
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        points=points,
        latest=dict(run.data.metrics),
        files=set(_files(client, info.run_id)),
        datasets={(logged.dataset.name, logged.dataset.digest) for logged in run.inputs.dataset_inputs},
        info={"name": info.run_name, "status": info.status, "start": info.start_time, "end": info.end_time},
        run=info.run_id,
    )


def _files(client: MlflowClient, run: str, folder: str | None = None) -> Iterator[str]:
    for file in client.list_artifacts(run, folder):
        if file.is_dir:
            yield from _files(client, run, file.path)
        else:
            yield str(file.path)
