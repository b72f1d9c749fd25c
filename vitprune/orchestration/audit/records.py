"""Compare the records of a run with each other: MLflow, run log, dvc.lock, git commit, artifacts and project.

Every check yields one message per difference.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitprune.errors import BadInput
from vitprune.orchestration.audit.attested import chain, facts, pipeline, stages
from vitprune.orchestration.audit.collect import CollectedRun
from vitprune.orchestration.audit.expected import RunContent, actual, expected
from vitprune.orchestration.audit.model_records import logged_model
from vitprune.orchestration.execution.dvc_cache import LockedFile, MissingFile, is_cached, pointers, read_lock, tree_md5
from vitprune.orchestration.execution.lock_and_repair import STATE
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.execution.worktrees import tracked_data
from vitprune.orchestration.tracking.journal import JOURNAL, RunLog, flatten
from vitprune.orchestration.tracking.kept_files import UPLOADED
from vitprune.orchestration.tracking.logged_model import KEY
from vitprune.orchestration.tracking.upload import HASH
from vitprune.runtime.commands import git
from vitprune.runtime.files import md5, sha256
from vitprune.runtime.messages import Note
from vitprune.runtime.untrusted import without_credentials
from vitprune.runtime.yaml_files import load_yaml

Lines = Iterator[str]
LOCK_DIGEST = "vitprune.dvc_lock_sha256"
NOT_COMPARED = {"vitprune.project", "mlflow.user"}  # they differ between clones and users


def complete(collected: CollectedRun) -> Lines:
    """All records and files of the run could be collected."""
    yield from collected.missing


def records(collected: CollectedRun) -> Lines:
    """Every tag, parameter and metric in MLflow equals the run log's, for the run, its stages and its cycles."""
    flow = collected.parent.data.tags[KEY]
    run_log = RunLog(collected.scratch / "expected", flow)
    run_log.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(collected.records / JOURNAL, run_log.path)
    run_log.spool.parent.mkdir(parents=True, exist_ok=True)
    run_log.spool.symlink_to(collected.tree)
    try:
        wanted = expected(run_log, _computed_by(collected))
    except ValueError as error:
        yield str(error).replace(f"{run_log.spool}/", "").replace("; its run cannot be uploaded", "")
        return
    ids: dict[str, str] = {}
    for key, content in wanted.items():
        runs = actual(collected.client, collected.parent.info.experiment_id, key)
        name = content.tags["mlflow.runName"]
        if len(runs) != 1:
            yield f"{name}: MLflow has {len(runs) or 'no'} runs with the key {key}; there must be one"
            continue
        ids[key] = runs[0].run
        if above := content.tags.get("mlflow.parentRunId"):
            content.tags["mlflow.parentRunId"] = ids.get(above, "")
        yield from _differences(name, content, runs[0])
    if ids.get(flow, collected.parent.info.run_id) != collected.parent.info.run_id:
        yield f"run {collected.parent.info.run_id}: is not the run with the key {flow}"


def lockfile(collected: CollectedRun) -> Lines:
    """dvc.lock, dvc.yaml and params.yaml are consistent with each other."""
    lock = read_lock(collected.records / "dvc.lock")
    pipeline = load_yaml(collected.records / "dvc.yaml")["stages"]
    params = flatten(load_yaml(collected.records / "params.yaml"))
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
                yield f"dvc.lock: {stage} read another {dep['path']} than the earlier stage wrote"
        written |= {out["path"]: out["md5"] for out in entry["outs"]}


def commit(collected: CollectedRun) -> Lines:
    """params.yaml, dvc.yaml and the code that the stages depend on are those of the run's commit."""
    if not collected.commit:
        yield "git: the run has no commit; commit the project and run again"
        return
    differing = collected.parent.data.tags.get("vitprune.git_changed", "").splitlines()
    if differing:
        yield Note(f"the run used uncommitted changes of {', '.join(differing)}")
    if not git(collected.project, "branch", "--remotes", "--contains", collected.commit).stdout.strip():
        yield Note(f"no branch of a git remote has the commit {collected.commit[:12]}; nobody else can see it there")
    for name in ("params.yaml", "dvc.yaml"):
        shown = git(collected.project, "show", "--end-of-options", f"{collected.commit}:{collected.prefix}{name}")
        recorded = (collected.records / name).read_text(encoding="utf-8")
        if name not in differing and shown.stdout != recorded:
            yield f"{name}: differs from commit {collected.commit[:12]}, and the run recorded no such change"
    tracked = tracked_data(collected.tree)
    for path, digest in _inputs(collected).items():
        file = collected.tree / path
        if file.is_symlink() or path in tracked or any(f"{other}/".startswith(f"{path}/") for other in differing):
            continue  # not in git: the check of images reads them one by one
        if not file.exists():
            yield f"{path}: is neither in commit {collected.commit[:12]} nor in the project"
        elif (tree_md5(file) if file.is_dir() else md5(file)) != digest:
            yield f"{path}: has another MD5 in commit {collected.commit[:12]} than in dvc.lock"


def artifacts(collected: CollectedRun) -> Lines:
    """Every file in the DVC cache and in MLflow has the checksum of dvc.lock and of the run log."""
    try:
        files = list(collected.store.files(read_lock(collected.records / "dvc.lock")))
    except MissingFile as error:
        yield str(error)
        return
    for name, entry in pointers(collected.tree).items():
        if not collected.store.missing({name: entry}):  # else the data is read from the project
            files += collected.store.files({name: entry})
    for file in files:
        path = collected.tree / file.path
        if is_cached(file.path) and path.is_file() and md5(path) != file.md5:
            yield f"{file.path}: DVC's copy has the MD5 {md5(path)}, {_source(file)} says {file.md5}"
        for record in (collected.records / file.path, *collected.records.glob(f"*/{file.path}")):
            if record.is_file() and md5(record) != file.md5:
                yield f"{file.path}: MLflow's copy has the MD5 {md5(record)}, dvc.lock says {file.md5}"
    facts = [collected.stage_fact(stage) for stage in STAGES]
    for kept in (file for fact in facts for file in (*fact.get("files", ()), *fact.get("model", ()))):
        path = collected.tree / kept["path"]
        if path.is_file() and sha256(path) != kept["sha256"]:
            yield f"{kept['path']}: its sha256 is {sha256(path)}, the run log says {kept['sha256']}"
    yield from logged_model(collected)


def project(collected: CollectedRun) -> Lines:
    """The files in the project are those of this run, or of a later run that MLflow has; so is its run log."""
    kept = collected.project / STATE / "journal" / UPLOADED / f"{collected.parent.data.tags[KEY]}.jsonl"
    if kept.is_file() and sha256(kept) != sha256(collected.records / JOURNAL):
        yield f"{JOURNAL}: MLflow's differs from the project's copy, {kept}"
    lock = collected.project / "dvc.lock"
    if not lock.is_file():
        return  # a clone without outputs
    if sha256(lock) != collected.parent.data.tags.get(LOCK_DIGEST):
        wanted = f"tags.`{LOCK_DIGEST}` = '{sha256(lock)}'"
        if not collected.client.search_runs([collected.parent.info.experiment_id], wanted, max_results=1):
            yield f"{lock}: belongs to no run in MLflow; edited by hand, or written by `dvc repro` alone"
        return
    try:
        entries = read_lock(lock) | pointers(collected.project)
    except BadInput as error:
        yield str(error)
        return
    for name, entry in entries.items():
        yield from _changed_files(collected, name, entry)
    outputs = [out["path"] for entry in entries.values() for out in entry.get("outs", ())]
    contents = {name: sorted((collected.project / name).rglob("*")) for name in outputs}  # of a file nothing
    yield from _links(collected, contents)
    yield from _other_files(collected, entries, contents)


CHECKS: dict[str, Callable[[CollectedRun], Lines]] = {
    check.__name__: check
    for check in (complete, chain, stages, pipeline, facts, lockfile, commit, artifacts, records, project)
}


def run_check(name: str, collected: CollectedRun) -> Lines:
    """Run one of CHECKS and yield its differences; an exception, as from a tampered file, is a difference too."""
    try:
        yield from CHECKS[name](collected)
    except Exception as error:  # a tampered file can raise anything
        reason = without_credentials(" ".join(str(error).split()))[:200]
        yield f"{name}: cannot be checked ({type(error).__name__}: {reason})"


def _changed_files(collected: CollectedRun, name: str, entry: Mapping[str, Any]) -> Lines:
    """Yield the project's files that differ from an entry; one line for a folder whose list is not in the cache."""
    for out in entry.get("outs", ()):
        path = collected.project / out["path"]
        if not path.exists():
            continue
        listed = collected.store.path_of(out["md5"])
        if path.is_dir() and not listed.is_file():
            if tree_md5(path) != out["md5"]:
                yield f"{path}: has another MD5 than in {name}"
            continue
        for file in collected.store.files({name: {"outs": [out]}}):
            local = collected.project / file.path
            if local.is_file() and md5(local) != file.md5:
                yield f"{local}: has the MD5 {md5(local)}, {_source(file)} says {file.md5}"


def _links(collected: CollectedRun, contents: Mapping[str, Sequence[Path]]) -> Lines:
    """Yield a note for every symbolic link in the paths of DVC's files, other than DVC's own into its cache."""
    files = [path.relative_to(collected.project) for below in contents.values() for path in below]
    parts = {part for path in (*map(Path, contents), *files) for part in (path, *path.parents)}
    for part in sorted(part for part in parts if (collected.project / part).is_symlink()):
        target = (collected.project / part).resolve()
        if not target.is_relative_to(collected.store.cache):
            yield Note(f"{part} is a symbolic link to {target}, whose content other projects can change")


def _other_files(collected: CollectedRun, entries: Mapping[str, Any], contents: Mapping[str, Sequence[Path]]) -> Lines:
    """Yield a note for every folder with files that DVC does not list."""
    for name, entry in entries.items():
        for out in entry.get("outs", ()):
            folder = collected.project / out["path"]
            if not folder.is_dir() or not collected.store.path_of(out["md5"]).is_file():
                continue  # the checksum of the folder is compared
            listed = {collected.project / file.path for file in collected.store.files({name: {"outs": [out]}})}
            others = [path for path in contents[out["path"]] if path.is_file() and path not in listed]
            others = [path for path in others if "__pycache__" not in path.parts]
            if others:
                number = "1 file that is" if len(others) == 1 else f"{len(others)} files that are"
                first, source = others[0].relative_to(collected.project), name if name.endswith(".dvc") else "dvc.lock"
                yield Note(f"{out['path'].rstrip('/')} has {number} not in {source}, {first}")


def _source(file: LockedFile) -> str:
    """Return the file in which the checksum of another file is recorded."""
    return file.stage if file.stage.endswith(".dvc") else "dvc.lock"


def _computed_by(collected: CollectedRun) -> dict[str, dict[str, str]]:
    """Return the runs that computed the cached stages, by the hash of the stage's entry in dvc.lock."""
    sources = {}
    for run in collected.stages.values():
        if not run.data.tags[KEY].startswith(collected.parent.data.tags[KEY]) and HASH in run.data.tags:
            sources[run.data.tags[HASH]] = {"run": run.info.run_id, "key": run.data.tags[KEY]}
    return sources


def _differences(name: str, wanted: RunContent, recorded: RunContent) -> Lines:
    for entry, ours, theirs in (("tag", wanted.tags, recorded.tags), ("param", wanted.params, recorded.params)):
        for key, text in ours.items():
            if theirs.get(key) != text and key not in NOT_COMPARED:
                yield f"{name}: {entry} {key} is {theirs.get(key)!r} in MLflow, {text!r} in the run log"
    for key, value in wanted.info.items() if "status" in wanted.info else ():  # a sweep's run is ended by the sweep
        if recorded.info.get(key) != value:
            yield f"{name}: {key} is {recorded.info.get(key)!r} in MLflow, {value!r} in the run log"
    for key, metric in sorted(recorded.latest.items()):
        if wanted.latest.get(key) != metric:
            yield f"{name}: metric {key} is shown as {metric} in MLflow, {wanted.latest.get(key)} in the run log"
    for key in sorted(recorded.tags.keys() - wanted.tags.keys() - NOT_COMPARED):
        yield Note(f"{name}: tag {key} is in MLflow only: {recorded.tags[key][:60]!r}")
    for path in sorted(recorded.files - wanted.files):
        yield Note(f"{name}: the artifact {path} is in MLflow only")
    for source, digest in sorted(recorded.datasets ^ wanted.datasets):
        where = "MLflow" if (source, digest) in recorded.datasets else "the run log"
        yield f"{name}: the data set {source} with the digest {digest} is in {where} only"
    for key in sorted(recorded.params.keys() - wanted.params.keys()):
        yield f"{name}: param {key} has been added in MLflow"
    for key, step, value in sorted(recorded.points - wanted.points):
        logged = next((v for k, s, v in wanted.points if (k, s) == (key, step)), "nothing")
        yield f"{name}: metric {key} (step {step}) is {value} in MLflow, {logged} in the run log"
    for key, step, _ in sorted(wanted.points - recorded.points):
        if not any((k, s) == (key, step) for k, s, _ in recorded.points):
            yield f"{name}: metric {key} (step {step}) is missing in MLflow"


def _params(stage: str, locked: Mapping[str, Any], params: Mapping[str, Any]) -> Lines:
    for key, value in locked.items():
        if key in params and not _same(params[key], value):
            yield f"params.yaml: {key} is {params[key]!r}, {stage} ran with {value!r} (dvc.lock)"
        elif key not in params and value not in (None, {}):
            yield f"params.yaml: {key} is missing, {stage} ran with {value!r} (dvc.lock)"


def _same(value: Any, locked: Any) -> bool:
    """Whether two YAML values are equal; PyYAML reads the 1e-08 of DVC as a string."""
    if isinstance(value, float) and isinstance(locked, str):
        try:
            return value == float(locked)
        except ValueError:
            return False
    return bool(value == locked)


def _inputs(collected: CollectedRun) -> dict[str, str]:
    """Return paths and MD5s of the files that stages read but no stage writes."""
    lock = read_lock(collected.records / "dvc.lock")
    written = {out["path"].rstrip("/") for entry in lock.values() for out in entry["outs"]}
    deps = {dep["path"].rstrip("/"): dep["md5"] for entry in lock.values() for dep in entry.get("deps", ())}
    return {path: digest for path, digest in deps.items() if path not in written and not Path(path).is_absolute()}
