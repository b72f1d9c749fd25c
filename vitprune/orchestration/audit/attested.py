"""Verify the attestation of a run: signatures, the chain of statements, and what they say about the run's records.

Every check yields one message per difference, and a Note for what it cannot prove.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

from vitprune.orchestration.attestation.signing import key_fingerprint, read_envelopes, verified_by
from vitprune.orchestration.attestation.statements import BUNDLE, LINK, Statement, timestamp
from vitprune.orchestration.audit.collect import RECORDED, CollectedRun
from vitprune.orchestration.execution.dvc_cache import is_cached, read_lock
from vitprune.orchestration.execution.run_stage import STAGES
from vitprune.orchestration.tracking.journal import JOURNAL, flatten, stage_outputs
from vitprune.orchestration.tracking.logged_model import KEY
from vitprune.pipeline.project_template import shipped_pipeline
from vitprune.runtime.files import PACKAGE, code_digest, read_json, sha256
from vitprune.runtime.messages import Note
from vitprune.runtime.yaml_files import load_yaml

Lines = Iterator[str]


def signature(collected: CollectedRun, keys: Sequence[SSlibKey]) -> Lines:
    """Every statement is signed by one of the trusted keys; without keys, say what is not proven."""
    envelopes, signers = read_envelopes(collected.records / BUNDLE), set()
    for envelope, statement in zip(envelopes, collected.statements, strict=True):
        key = verified_by(envelope, keys)
        if key is not None:
            signers.add(key_fingerprint(key))
        elif keys:
            yield f"{BUNDLE}: the statement {statement.name} has no valid signature of a trusted key"
    link = collected.records / LINK
    if keys and link.is_file():
        yield from _link_differences(link, keys, {BUNDLE: {"sha256": sha256(collected.records / BUNDLE)}})
    if keys:
        yield from (Note(f"signed by the trusted key {name}") for name in sorted(signers))
    elif any(envelope.signatures for envelope in envelopes):
        yield Note("the signatures were not verified; give the public keys that you trust by --trusted-keys FILE")
    else:
        yield Note(
            "the run is not signed: whoever can write to the project, MLflow and the DVC remote can replace all of it"
        )


def _link_differences(path: Path, keys: Sequence[SSlibKey], products: Mapping[str, Mapping[str, str]]) -> Lines:
    envelopes = read_envelopes(path)
    if not envelopes or verified_by(envelopes[0], keys) is None:
        yield f"{LINK}: has no valid signature of a trusted key"
    elif not products.items() <= json.loads(envelopes[0].payload)["products"].items():
        yield f"{LINK}: names another {BUNDLE}"


def chain(collected: CollectedRun) -> Lines:
    """The statements form a chain, and the last one names the run log, params.yaml, dvc.yaml, dvc.lock and commit."""
    statements = collected.statements
    names = [statement.name for statement in statements]
    if names != [*STAGES, "run"]:
        yield f"{BUNDLE}: has the statements {names}, a finished run has one for every stage and one for the run"
        return
    for before, statement in zip([None, *statements], statements, strict=False):
        if statement.flow_run_id != collected.parent.data.tags[KEY]:
            yield f"{BUNDLE}: the statement {statement.name} is of the run {statement.flow_run_id}"
        if before and statement.dependencies.get(f"statement/{before.name}") != {"sha256": before.sha256}:
            yield f"{BUNDLE}: the statement {statement.name} does not follow the statement {before.name}"
    run, start = statements[-1], next(fact for fact in collected.facts if fact["fact"] == "start")
    for name in (JOURNAL, *RECORDED):
        digest = sha256(collected.records / name)
        if run.subjects.get(name) != {"sha256": digest}:
            yield f"{name}: its sha256 is {digest}, the attestation names {run.subjects.get(name)}"
    if run.dependencies.get("git", {}).get("gitCommit", "") != collected.commit:
        yield f"tag mlflow.source.git.commit: is {collected.commit!r}, the attestation names another commit"
    if dict(run.facts) != {key: start[key] for key in ("git", "versions")}:
        yield f"{JOURNAL}: git state or versions differ from the attestation"


def stages(collected: CollectedRun) -> Lines:
    """Every statement agrees with dvc.lock, the run log, the files of the run, and vitprune's pipeline."""
    lock = read_lock(collected.records / "dvc.lock")
    for statement in collected.statements[:-1]:
        stage, entry = statement.name, lock.get(statement.name, {})
        fact = collected.stage_fact(stage)
        times = (fact.get("started", 0.0), fact.get("started", 0.0) + fact.get("seconds", 0.0))
        recorded = {
            "command": entry.get("cmd"),
            "params": flatten(entry.get("params", {}).get("params.yaml", {})),
            "start and end": tuple(map(timestamp, times)),
            "cached and seconds": {key: fact.get(key) for key in ("cached", "seconds")},
        } | {out["path"]: out["md5"] for key in ("outs", "deps") for out in entry.get(key, ())}
        attested = {
            "command": statement.parameters.get("command"),
            "params": flatten(statement.parameters.get("params", {})),
            "start and end": (statement.started, statement.finished),
            "cached and seconds": dict(statement.facts),
        } | {name: row["md5"] for name, row in _files(statement).items() if "md5" in row}
        for name in sorted(recorded.keys() | attested.keys()):
            if recorded.get(name) != attested.get(name):
                yield f"{stage}: {name} is {recorded.get(name)!r}, the attestation says {attested.get(name)!r}"
        yield from _attested_files(collected, statement)


def pipeline(collected: CollectedRun) -> Lines:
    """Yield a note for every command, dependency, output and code of the run that differs from this vitprune's."""
    stages = load_yaml(collected.records / "dvc.yaml")["stages"]
    shipped = shipped_pipeline()
    for stage in (*shipped, *(stages.keys() - shipped.keys())):
        ours, theirs = _declared(shipped.get(stage, {})), _declared(stages.get(stage, {}))
        for key, value in ours.items():
            missing = [name for name in value if name not in theirs[key]]
            added = [name for name in theirs[key] if name not in value and key != "deps"]
            for word, names in (("lacks", missing), ("adds", added)):
                if names:
                    yield Note(f"dvc.yaml: {stage}: {key} {word} {', '.join(names)}, unlike vitprune's pipeline")
    packages = (PACKAGE, collected.tree / "vitprune")
    digests = {code_digest(package) for package in packages if (package / "__init__.py").is_file()}
    used = {statement.dependencies.get("vitprune", {}).get("sha256", "") for statement in collected.statements[:-1]}
    if not used <= digests:
        yield Note("the run used another code of vitprune than this audit and the commit; install its version")


def _declared(stage: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what dvc.yaml declares for a stage, without code and the options of plots."""
    files = [*stage.get("outs", ()), *stage.get("metrics", ()), *stage.get("plots", ())]
    options = sorted(stage.keys() - {"cmd", "deps", "params", "outs", "metrics", "plots", "desc"})
    return {
        "cmd": [str(stage.get("cmd"))],
        "deps": [dep for dep in stage.get("deps", ()) if not dep.startswith("vitprune/")],
        "params": [str(name) for name in stage.get("params", ())],
        "outs": [name if isinstance(name, str) else next(iter(name)) for name in files],
        "options": options,
    }


def facts(collected: CollectedRun) -> Lines:
    """The run log says about params, versions and outputs what the run's files say."""
    start = next(fact for fact in collected.facts if fact["fact"] == "start")
    params = load_yaml(collected.records / "params.yaml")
    yield from _differences("params", start["params"], flatten(params))
    used = read_json(collected.tree / "metrics/latency.json").get("environment", {})
    versions = {package: version for package, version in start["versions"].items() if package in used}
    # torch adds its build to its version, as in 2.15.0+cu132
    yield from _differences("versions", versions, {name: str(used[name]).partition("+")[0] for name in versions})

    def keep(name: str) -> dict[str, str]:
        return {"path": name, "sha256": sha256(collected.tree / name)}

    for stage in STAGES:
        fact, outputs = collected.stage_fact(stage), stage_outputs(collected.tree, stage, keep)
        logged = {key: fact.get(key) for key in outputs}
        yield from _differences(stage, logged, outputs)


def _differences(label: str, logged: Any, expected: Any) -> Lines:
    ours, theirs = _leaves(logged), _leaves(expected)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"{JOURNAL}: {label}: {key} is {ours.get(key)!r}, the files give {theirs.get(key)!r}"


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping with dotted keys; values as JSON has them."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {k: v for key, below in pairs for k, v in _leaves(below, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: value}


def _files(statement: Statement) -> dict[str, Mapping[str, str]]:
    others = {name: row for name, row in statement.dependencies.items() if not name.startswith("statement/")}
    return {**others, **statement.subjects}


def _attested_files(collected: CollectedRun, statement: Statement) -> Lines:
    """Compare the SHA-256 of the files in the DVC cache and in MLflow with the statement's."""
    for name, row in statement.subjects.items():
        path = collected.tree / name
        if "sha256" in row and path.is_file() and sha256(path) != row["sha256"]:
            where = "DVC's copy" if is_cached(name) else "MLflow's copy"
            yield f"{name}: {where} has the sha256 {sha256(path)}, the attestation says {row['sha256']}"
