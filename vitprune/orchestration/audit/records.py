"""Whether the parts of a run agree: MLflow's records, the journal, dvc.lock, git, the artifacts and the project."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vitprune.orchestration.audit.collect import RECORDED, Evidence, git
from vitprune.orchestration.audit.expected import Content, actual, expected
from vitprune.orchestration.execution.dvc_cache import Missing, Named, is_cached, pointers, read_lock, tree_md5
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.tracking.journal import MODEL, RunLog, flatten
from vitprune.orchestration.tracking.logged_model import DIGEST
from vitprune.orchestration.tracking.replay import MIRRORED
from vitprune.orchestration.tracking.upload import HASH, JOURNAL, JOURNAL_DIGEST, KEY
from vitprune.runtime.files import md5, sha256

Lines = Iterator[str]
LOCK_DIGEST = "vitprune.dvc_lock_sha256"
PARTLY = {"vitprune.project", "mlflow.user"}  # say where and by whom, which the journal does not


def complete(evidence: Evidence) -> Lines:
    """Everything that the run speaks of is there."""
    yield from evidence.missing


def journal(evidence: Evidence) -> Lines:
    """The journal is the one that the run names, and the one that the project has kept."""
    path, flow = evidence.records / JOURNAL, evidence.parent.data.tags[KEY]
    wanted = evidence.parent.data.tags.get(JOURNAL_DIGEST)
    if sha256(path) != wanted:
        yield f"{JOURNAL}: its sha256 is {sha256(path)}, the run says {wanted}"
    kept = evidence.project / STATE / "journal" / MIRRORED / f"{flow}.jsonl"
    if kept.is_file() and sha256(kept) != sha256(path):
        yield f"{JOURNAL}: MLflow's is not the project's own, {kept}"


def records(evidence: Evidence) -> Lines:
    """Every tag, parameter and metric of MLflow is the journal's, in the run, its stages and its cycles."""
    flow = evidence.parent.data.tags[KEY]
    stand_in = RunLog(evidence.scratch / "expected", flow)
    stand_in.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(evidence.records / JOURNAL, stand_in.path)
    stand_in.spool.parent.mkdir(parents=True, exist_ok=True)
    stand_in.spool.symlink_to(evidence.tree)
    try:
        wanted = expected(stand_in, _computed_by(evidence))
    except ValueError as error:
        yield str(error).replace(f"{stand_in.spool}/", "").replace("; its run cannot be mirrored", "")
        return
    ids: dict[str, str] = {}
    for key, content in wanted.items():
        found = actual(evidence.client, evidence.parent.info.experiment_id, key)
        name = content.tags["mlflow.runName"]
        if found is None:
            yield f"{name}: MLflow has no run with the key {key}"
            continue
        ids[key] = found.run
        if above := content.tags.get("mlflow.parentRunId"):
            content.tags["mlflow.parentRunId"] = ids.get(above, "")
        yield from _compared(name, content, found)


def lockfile(evidence: Evidence) -> Lines:
    """dvc.lock, dvc.yaml and params.yaml are those of the run, and agree with each other."""
    tags = evidence.parent.data.tags
    for name in RECORDED:
        wanted = tags.get(f"vitprune.{name.replace('.', '_')}_sha256")
        if sha256(evidence.records / name) != wanted:
            yield f"{name}: its sha256 is {sha256(evidence.records / name)}, the run says {wanted}"
    lock = read_lock(evidence.records / "dvc.lock")
    pipeline = yaml.safe_load((evidence.records / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    params = flatten(yaml.safe_load((evidence.records / "params.yaml").read_text(encoding="utf-8")))
    written: dict[str, str] = {}
    for stage in STAGES:
        entry = lock.get(stage)
        if entry is None:
            yield f"dvc.lock: has no stage {stage}"
            continue
        if entry["cmd"] != pipeline.get(stage, {}).get("cmd"):
            yield f"dvc.lock: {stage}: cmd is {entry['cmd']!r}, dvc.yaml says {pipeline.get(stage, {}).get('cmd')!r}"
        yield from _params(stage, flatten(entry.get("params", {}).get("params.yaml", {})), params)
        for dep in entry.get("deps", ()):
            if written.get(dep["path"], dep["md5"]) != dep["md5"]:
                yield f"dvc.lock: {stage} read another {dep['path']} than the stage before had written"
        written |= {out["path"]: out["md5"] for out in entry["outs"]}
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()
        if digest != evidence.stage_fact(stage).get("lock", {}).get("sha256"):
            yield f"dvc.lock: {stage}: its entry is not the one that the run recorded"


def commit(evidence: Evidence) -> Lines:
    """What git tracks is as the run recorded it: params.yaml, dvc.yaml, and the code that stages depend on."""
    if not evidence.commit:
        yield "git: the run names no commit; commit the project and run again"
        return
    prefix, changed = (evidence.parent.data.tags.get(f"vitprune.git_{name}", "") for name in ("prefix", "changed"))
    differing = changed.splitlines()
    for name in ("params.yaml", "dvc.yaml"):
        shown = git(evidence.project, "show", f"{evidence.commit}:{prefix}{name}")
        recorded = (evidence.records / name).read_text(encoding="utf-8")
        if name not in differing and shown.stdout != recorded:
            yield f"{name}: is not that of commit {evidence.commit[:12]}, and the run did not say that it differed"
    for path, digest in _inputs(evidence).items():
        place = evidence.tree / path
        if (
            place.is_symlink()
            or path in _pointed(evidence)
            or path in differing
            or any(other.startswith(f"{path}/") for other in differing)
        ):
            continue  # not in git: images are read again, one by one
        if not place.exists():
            yield f"{path}: is neither in commit {evidence.commit[:12]} nor in the project"
        elif (tree_md5(place) if place.is_dir() else md5(place)) != digest:
            yield f"{path}: is not the file that dvc.lock names, in commit {evidence.commit[:12]}"


def artifacts(evidence: Evidence) -> Lines:
    """Every file of DVC's store and of MLflow has the digest that dvc.lock names."""
    try:
        files = list(evidence.store.files(read_lock(evidence.records / "dvc.lock")))
    except Missing as error:
        yield str(error)
        return
    named = [*files, *evidence.store.files(_had(evidence))]
    for file in named:
        place = evidence.tree / file.path
        if is_cached(file.path) and place.is_file() and md5(place) != file.md5:
            yield f"{file.path}: DVC's copy has the MD5 {md5(place)}, {_namer(file)} says {file.md5}"
        for record in evidence.records.glob(f"*/{file.path}"):
            if md5(record) != file.md5:
                yield f"{file.path}: MLflow's copy has the MD5 {md5(record)}, dvc.lock says {file.md5}"
    facts = [evidence.stage_fact(stage) for stage in STAGES]
    for kept in (file for fact in facts for file in (*fact.get("files", ()), *fact.get("model", ()))):
        place = evidence.tree / kept["path"]
        if place.is_file() and sha256(place) != kept["sha256"]:
            yield f"{kept['path']}: its sha256 is {sha256(place)}, the journal says {kept['sha256']}"
    yield from _logged_model(evidence)


def project(evidence: Evidence) -> Lines:
    """The project's own files are the run's, unless a later run that is on record has taken their place."""
    own = evidence.project / "dvc.lock"
    if not own.is_file():
        return  # a clone that has not checked out what it audits
    if sha256(own) != evidence.parent.data.tags.get(LOCK_DIGEST):
        wanted = f"tags.`{LOCK_DIGEST}` = '{sha256(own)}'"
        if not evidence.client.search_runs([evidence.parent.info.experiment_id], wanted, max_results=1):
            yield f"{own}: is of no run on record; changed by hand, or by `dvc repro` without vitprune-flow"
        return
    for name, entry in (read_lock(own) | pointers(evidence.project)).items():
        yield from _as_named(evidence, name, entry)


CHECKS: dict[str, Callable[[Evidence], Lines]] = {
    check.__name__: check for check in (complete, journal, lockfile, commit, artifacts, records, project)
}


def check(name: str, evidence: Evidence) -> Lines:
    """Carry out one of CHECKS; what cannot be read is a difference too."""
    try:
        yield from CHECKS[name](evidence)
    except Exception as error:  # what somebody has edited may be anything; MLflow and YAML have errors of their own
        yield f"{name}: cannot be checked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _pointed(evidence: Evidence) -> set[str]:
    """Paths that the run's .dvc files name."""
    return {out["path"] for entry in pointers(evidence.tree).values() for out in entry["outs"]}


def _as_named(evidence: Evidence, name: str, entry: Mapping[str, Any]) -> Lines:
    """Whether what lies in the project is what an entry names; file by file where DVC's list of a folder is there."""
    for out in entry.get("outs", ()):
        place = evidence.project / out["path"]
        if not place.exists():
            continue
        listed = evidence.store.path_of(out["md5"])
        if place.is_dir() and not listed.is_file():
            if tree_md5(place) != out["md5"]:
                yield f"{place}: is not the folder that {name} names"
            continue
        for file in evidence.store.files({name: {"outs": [out]}}):
            own = evidence.project / file.path
            if own.is_file() and md5(own) != file.md5:
                yield f"{own}: has the MD5 {md5(own)}, {_namer(file)} says {file.md5}"


def _had(evidence: Evidence) -> dict[str, Any]:
    """What the run's .dvc files name, of what DVC's store has; the rest is read as the project has it."""
    named = pointers(evidence.tree)
    return {name: entry for name, entry in named.items() if not evidence.store.lacks({name: entry})}


def _namer(file: Named) -> str:
    """The file that says what another one is."""
    return file.stage if file.stage.endswith(".dvc") else "dvc.lock"


def _computed_by(evidence: Evidence) -> dict[str, dict[str, str]]:
    """The runs that computed what cached stages found, by the digest of the stage's entry in dvc.lock."""
    found = {}
    for run in evidence.stages.values():
        if not run.data.tags[KEY].startswith(evidence.parent.data.tags[KEY]) and HASH in run.data.tags:
            found[run.data.tags[HASH]] = {"run": run.info.run_id, "key": run.data.tags[KEY]}
    return found


def _compared(name: str, wanted: Content, found: Content) -> Lines:
    for what, ours, theirs in (("tag", wanted.tags, found.tags), ("param", wanted.params, found.params)):
        for key, text in ours.items():
            if theirs.get(key) != text and key not in PARTLY:
                yield f"{name}: {what} {key} is {theirs.get(key)!r} in MLflow, the journal says {text!r}"
    for key in sorted(found.params.keys() - wanted.params.keys()):
        yield f"{name}: param {key} has been added in MLflow"
    for key, step, value in sorted(found.points - wanted.points):
        own = next((v for k, s, v in wanted.points if (k, s) == (key, step)), "nothing")
        yield f"{name}: metric {key} (step {step}) is {value} in MLflow, the journal says {own}"
    for key, step, _ in sorted(wanted.points - found.points):
        if not any((k, s) == (key, step) for k, s, _ in found.points):
            yield f"{name}: metric {key} (step {step}) is missing in MLflow"


def _params(stage: str, locked: Mapping[str, Any], params: Mapping[str, Any]) -> Lines:
    for key, value in locked.items():
        if key in params and not _same(params[key], value):
            yield f"params.yaml: {key} is {params[key]!r}, {stage} ran with {value!r} (dvc.lock)"
        elif key not in params and value not in (None, {}):
            yield f"params.yaml: {key} is missing, {stage} ran with {value!r} (dvc.lock)"


def _same(own: Any, locked: Any) -> bool:
    """Whether two values of YAML are one; DVC writes 1e-08, which is a word to others."""
    if isinstance(own, float) and isinstance(locked, str):
        try:
            return own == float(locked)
        except ValueError:
            return False
    return bool(own == locked)


def _inputs(evidence: Evidence) -> dict[str, str]:
    """Path and digest of what stages read and none of them wrote."""
    lock = read_lock(evidence.records / "dvc.lock")
    written = {out["path"].rstrip("/") for entry in lock.values() for out in entry["outs"]}
    deps = {dep["path"].rstrip("/"): dep["md5"] for entry in lock.values() for dep in entry.get("deps", ())}
    return {path: digest for path, digest in deps.items() if path not in written and not Path(path).is_absolute()}


def _logged_model(evidence: Evidence) -> Lines:
    """The model that MLflow has of the run is that of the files."""
    run, folder = evidence.stages["distill"], evidence.scratch / "model"
    found = evidence.client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", max_results=10
    )
    for model in found:
        folder.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            own, theirs = evidence.tree / MODEL / name, _model_file(evidence, model.model_id, name, folder)
            if theirs is None or sha256(theirs) != sha256(own):
                yield f"{name}: that of MLflow's model {model.model_id} is not {MODEL}'s"
        if model.tags.get(DIGEST) != sha256(evidence.tree / MODEL / "model.safetensors"):
            yield f"model {model.model_id}: tag {DIGEST} is not the sha256 of {MODEL}/model.safetensors"
    if not found:
        yield "distill: MLflow has no model of this run"


def _model_file(evidence: Evidence, model: str, name: str, folder: Path) -> Path | None:
    from mlflow.artifacts import download_artifacts

    uri = f"{evidence.client.get_logged_model(model).artifact_location}/{name}"
    try:
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except Exception:  # each kind of store has its own error for what is not there
        return None
