"""Upload run logs to MLflow; idempotent.

An MLflow run is found again by its tag `vitprune.key` (FLOW, FLOW/STAGE or FLOW/STAGE/CYCLE), so an interrupted upload
is continued.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag, ViewType
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from vitprune.orchestration.attestation.statements import LINK
from vitprune.orchestration.tracking.description import REPORT, description
from vitprune.orchestration.tracking.journal import JOURNAL, RunLog, read_log
from vitprune.orchestration.tracking.logged_model import DIGEST, KEY, find_model, model_digest, record_model
from vitprune.orchestration.tracking.store import find_run
from vitprune.runtime.files import read_json_lines, sha256

Fact = Mapping[str, Any]
TimedRow = tuple[dict[str, Any], float]  # an epoch of a curve, and when it was recorded, in seconds since 1970
JOURNAL_DIGEST, BUNDLE_DIGEST = "vitprune.journal_sha256", "vitprune.attestation_sha256"
CACHED, HASH = "vitprune.cached", "vitprune.dvc_stage_hash"


@dataclass(frozen=True)
class Uploader:
    """Uploads one run log into one experiment.

    Attributes:
        client: Client of the tracking store.
        experiment: Id of the experiment.
        journal: The run log, with its files in the spool.
        lost: Paths of files that are left out, since no copy exists any more.
    """

    client: MlflowClient
    experiment: str
    journal: RunLog
    lost: frozenset[str] = frozenset()

    def upload(self) -> str:
        """Upload the run log and its files; return the id of the parent run."""
        facts = read_log(self.journal.path)
        start = next(fact for fact in facts if fact["fact"] == "start")
        stages = [fact for fact in facts if fact["fact"] == "stage"]
        # a run log without an end event: the run was killed
        last = stages[-1]["started"] + stages[-1]["seconds"] if stages else start["time"]
        killed = {"fact": "end", "status": "KILLED", "error": "", "time": last, "files": []}
        end = next((fact for fact in facts if fact["fact"] == "end"), killed)
        parent = self._parent(start, stages, end)
        for fact in stages:
            self._stage(parent, fact)
        self._evaluation(parent, stages, end["time"])
        self._end(parent, end["status"], end["time"])
        return parent

    def _parent(self, start: Fact, stages: Iterable[Fact], end: Fact) -> str:
        flow = self.journal.flow_run_id
        tags = {"vitprune.prefect_flow_run_id": flow, "vitprune.project": str(self.journal.project)}
        tags |= start_tags(start) | {JOURNAL_DIGEST: sha256(self.journal.path)}
        tags |= {f"vitprune.{_stem(d)}_sha256": d["sha256"] for fact in stages if (d := fact.get("digest"))}
        tags |= {f"vitprune.{file['path'].replace('.', '_')}_sha256": file["sha256"] for file in end["files"]}
        tags[MLFLOW_RUN_NOTE] = description(start, stages, end["error"])
        bundle = self.journal.attestation.path
        if bundle.is_file():
            tags[BUNDLE_DIGEST] = sha256(bundle)
        if end["error"]:
            tags["vitprune.error"] = end["error"]
        name = f"compress-{flow[:8]}"
        if sweep := start.get("sweep"):
            name, sweep_tags = sweep["run"], {"vitprune.sweep": sweep["name"]}
            parent = self._run(sweep["key"], sweep["name"], start["time"], sweep_tags)
            tags |= sweep_tags | {"mlflow.parentRunId": parent}
        run = self._run(flow, name, start["time"], tags)
        self._params(run, start["params"])
        report = [file for fact in stages for file in fact.get("files", ()) if file["path"] == REPORT]
        self._files(run, (*start["files"], *end["files"], *report))
        self._dataset(run, str(start["params"].get("dataset.source")), stages)
        self.client.log_text(run, self.journal.path.read_text(encoding="utf-8"), JOURNAL)
        for path in (bundle, bundle.with_name(LINK)):
            if path.is_file():
                self.client.log_artifact(run, str(path))
        return run

    def _dataset(self, run: str, source: str, stages: Iterable[Fact]) -> None:
        """Log the image source with the digest of its manifest."""
        manifest = next((fact["digest"] for fact in stages if fact["stage"] == "dataset" and "digest" in fact), None)
        if manifest is not None:
            dataset = Dataset(source[:500], manifest["sha256"][:36], "vitprune", source)  # MLflow's limits
            self.client.log_inputs(run, [DatasetInput(dataset)])

    def _stage(self, parent: str, fact: Fact) -> None:
        stage, lock = fact["stage"], fact.get("lock", {"params": {}, "sha256": ""})
        tags = self._tags_of(fact, parent) | {HASH: lock["sha256"]}
        if digest := fact.get("digest"):
            tags[f"vitprune.{_stem(digest)}_sha256"] = digest["sha256"]
        if fact["error"]:
            tags["vitprune.error"] = fact["error"]
        source = self._computed_by(lock["sha256"]) if fact["cached"] else None
        if source is not None:
            tags["vitprune.computed_by"] = source
        tags |= digest_tags(fact)
        ended = fact["started"] + fact["seconds"]
        run = self._run(f"{self.journal.flow_run_id}/{stage}", stage, fact["started"], tags)
        self._params(run, lock["params"])
        self._metrics(run, {"seconds": fact["seconds"], **fact.get("metrics", {})}, ended)
        if source is None:  # else the run that computed them has the files
            self._computed(run, fact, ended)
        self._end(run, "FAILED" if fact["exit_code"] else "FINISHED", ended)

    def _computed(self, run: str, fact: Fact, ended: float) -> None:
        self._files(run, fact.get("files", ()))
        rows = [row for file in fact.get("files", ()) for row in self._history(file)]
        times = fact.get("epochs", ())
        timed = list(zip(rows, times if len(times) == len(rows) else [ended] * len(rows), strict=True))
        self._curves(run, timed)
        for cycle in fact.get("cycles", ()):
            self._cycle(run, fact, cycle, [(row, time) for row, time in timed if row.get("cycle") == cycle["cycle"]])
        files = fact.get("model", ())
        if files and not self.lost.intersection(file["path"] for file in files):
            key = f"{self.journal.flow_run_id}/{fact['stage']}"
            record_model(self.client, self.experiment, run, key, self.journal.spool, files)

    def _cycle(self, parent: str, stage: Fact, cycle: Fact, rows: list[TimedRow]) -> None:
        number, ended = cycle["cycle"], stage["started"] + stage["seconds"]
        tags = self._tags_of(stage, parent) | {"vitprune.cycle": str(number)} | digest_tags(cycle)
        key = f"{self.journal.flow_run_id}/{stage['stage']}/{number:02d}"
        run = self._run(key, f"cycle-{number:02d}", stage["started"], tags)
        self._metrics(run, cycle["metrics"], ended, step=number)
        self._metrics(parent, cycle["metrics"], ended, step=number)
        self._curves(run, rows)
        self._files(run, cycle["files"])
        self._end(run, "FINISHED", ended)

    def _tags_of(self, stage: Fact, parent: str) -> dict[str, str]:
        """Return the tags that the runs of a stage and of its cycles share."""
        return {
            "mlflow.parentRunId": parent,
            "vitprune.prefect_flow_run_id": self.journal.flow_run_id,
            "vitprune.dvc_stage": stage["stage"],
            CACHED: str(stage["cached"]).lower(),
        }

    def _run(self, key: str, name: str, started: float, tags: Mapping[str, str]) -> str:
        """Return the run with a key; create it if there is none."""
        run = find_run(self.client, self.experiment, KEY, key)
        all_tags = {KEY: key, "mlflow.runName": name, "mlflow.source.name": "vitprune run", **tags}
        if run is None:
            run = self.client.create_run(self.experiment, _milliseconds(started), all_tags, name)
        else:
            self.client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in all_tags.items()])
        return str(run.info.run_id)

    def _computed_by(self, digest: str) -> str | None:
        """Return the finished, uncached run of another flow that computed an entry of dvc.lock, or None."""
        wanted = f"tags.`{HASH}` = '{digest}' and attributes.status = 'FINISHED'"
        for run in self.client.search_runs([self.experiment], wanted, order_by=["attributes.start_time ASC"]):
            flow = run.data.tags[KEY].split("/")[0]
            if "vitprune.computed_by" not in run.data.tags and flow != self.journal.flow_run_id:
                return str(run.info.run_id)
        return None

    def _evaluation(self, parent: str, stages: Iterable[Fact], ended: float) -> None:
        """Log the metrics of the evaluate stage with the parent run and with the logged model."""
        numbers = {k: v for fact in stages if fact["stage"] == "evaluate" for k, v in fact.get("metrics", {}).items()}
        self._metrics(parent, numbers, ended)
        digest = next((d for fact in stages if (d := model_digest(fact.get("model", ())))), None)
        if digest is None:
            return
        own = find_model(self.client, self.experiment, KEY, f"{self.journal.flow_run_id}/distill")
        model = own or find_model(self.client, self.experiment, DIGEST, digest)  # distill is cached: of another run
        if model is None:
            return
        time, name = _milliseconds(ended), model.model_id
        rows = [Metric(key, float(value), time, 0, model_id=name) for key, value in numbers.items()]
        self.client.log_batch(parent, rows)

    def _params(self, run: str, params: Mapping[str, Any]) -> None:
        self.client.log_batch(run, params=[Param(name, str(value)) for name, value in params.items()])

    def _metrics(self, run: str, metrics: Mapping[str, float], ended: float, step: int = 0) -> None:
        time = _milliseconds(ended)
        self.client.log_batch(run, [Metric(name, float(value), time, step) for name, value in metrics.items()])

    def _curves(self, run: str, rows: list[TimedRow]) -> None:
        """Log training curves: one row and its time per epoch."""
        steps = [int(row.get("step", number)) for number, (row, _) in enumerate(rows)]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            steps = list(range(len(rows)))  # steps restart in every cycle
        points = [
            Metric(f"curve.{name}", float(value), _milliseconds(time), step)
            for (row, time), step in zip(rows, steps, strict=True)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in {"step", "cycle"}
        ]
        self.client.log_batch(run, points)

    def _history(self, file: Fact) -> list[dict[str, Any]]:
        if not file["path"].endswith("history.jsonl") or file["path"] in self.lost:
            return []
        return read_json_lines(self.journal.spool / file["path"])

    def _files(self, run: str, files: Iterable[Fact]) -> None:
        """Log files under their relative paths in the project, after comparing their SHA-256 with the run log."""
        for file in files:
            if file["path"] in self.lost:
                continue
            path = self.journal.spool / file["path"]
            if not path.is_file() or sha256(path) != file["sha256"]:
                raise ValueError(f"{path}: has another SHA-256 than in the run log; its run cannot be uploaded")
            folder = str(Path(file["path"]).parent)
            self.client.log_artifact(run, str(path), None if folder == "." else folder)

    def _end(self, run: str, status: str, ended: float) -> None:
        self.client.set_terminated(run, status, _milliseconds(ended))


def has_run(client: MlflowClient, experiment: str, key: str) -> bool:
    """Whether MLflow has the run of a key with its journal; a run that a user has deleted counts."""
    runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", ViewType.ALL, max_results=1)
    if runs and runs[0].info.lifecycle_stage == "active":
        return any(file.path == JOURNAL for file in client.list_artifacts(runs[0].info.run_id))
    return bool(runs)


def start_tags(start: Fact) -> dict[str, str]:
    """Return commit and uncommitted changes of a run as tags."""
    git = start["git"]
    tags = {f"mlflow.source.git.{name}": str(git[name]) for name in ("commit", "branch", "dirty") if name in git}
    if git:
        changed = "\n".join(git.get("changed", ()))
        tags |= {"vitprune.git_prefix": git.get("prefix") or "", "vitprune.git_changed": changed}
    return tags


def digest_tags(fact: Fact) -> dict[str, str]:
    """Return the SHA-256 of the masks and of the main output of a stage or a cycle as tags."""
    masks = next((file["sha256"] for file in fact.get("files", ()) if file["path"].endswith("masks.safetensors")), None)
    tags = {} if masks is None else {"vitprune.masks_sha256": masks}
    return tags | ({"vitprune.sha256": fact["sha256"]} if fact.get("sha256") else {})


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _stem(file: Fact) -> str:
    return Path(file["path"]).stem
