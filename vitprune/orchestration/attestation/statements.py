"""In-toto statements of a run: one per stage and one that closes the chain, with SLSA's provenance predicate.

A statement names the SHA-256 of the statement before it, so the last one fixes them all.

Source: https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import vitprune
from vitprune.errors import BadInput
from vitprune.orchestration.attestation.signing import read_envelopes, seal, signing_key
from vitprune.runtime.files import PACKAGE, code_digest, sha256

STATEMENT, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
STAGE_TYPE, RUN_TYPE, BUILDER = "urn:vitprune:stage:v1", "urn:vitprune:run:v1", "urn:vitprune:flow:v1"
BUNDLE = "attestation.jsonl"  # one envelope per line, as an in-toto bundle
LINK = "run.link"  # the signed run as a link, the older format that in-toto's command line reads

Digests = Mapping[str, Mapping[str, str]]  # of paths: algorithm and hexadecimal digest


def descriptors(digests: Digests) -> list[dict[str, Any]]:
    """Return digests as in-toto's resource descriptors, sorted by name."""
    return [{"name": name, "digest": dict(digests[name])} for name in sorted(digests)]


@dataclass(frozen=True)
class Attestation:
    """The statements of a flow run, written one by one to a file of envelopes.

    Attributes:
        path: The file; each statement is appended when its stage has ended.
        flow_run_id: Id of the flow run.
    """

    path: Path
    flow_run_id: str

    def add_stage(
        self, fact: Mapping[str, Any], entry: Mapping[str, Any], subjects: Digests, dependencies: Digests
    ) -> None:
        """Append the statement of a stage.

        Args:
            fact: Event of the run log: stage, start, seconds, whether it was cached.
            entry: The stage's entry in dvc.lock.
            subjects: Digests of the files that it wrote.
            dependencies: Digests of what it read.
        """
        parameters = {"command": entry.get("cmd", ""), "params": entry.get("params", {}).get("params.yaml", {})}
        times = (fact["started"], fact["started"] + fact["seconds"])
        package = {"vitprune": {"sha256": code_digest(PACKAGE)}}
        facts = {"cached": fact["cached"], "seconds": fact["seconds"]}
        self._append(STAGE_TYPE, fact["stage"], parameters, facts, subjects, {**dependencies, **package}, times)

    def close(self, start: Mapping[str, Any], end: Mapping[str, Any], subjects: Digests) -> None:
        """Append the statement of the run, which names the run's records and the statement of the last stage.

        Args:
            start: First event of the run log: params, git state, versions.
            end: Last event of the run log.
            subjects: Digests of the run log and of params.yaml, dvc.yaml and dvc.lock.
        """
        facts = {key: start[key] for key in ("git", "versions") if key in start}
        commit = start.get("git", {}).get("commit")
        code = {"git": {"gitCommit": commit}} if commit else {}
        parameters = {"status": end["status"], "error": end["error"]}
        times = (start["time"], end["time"])
        self._append(RUN_TYPE, "run", parameters, facts, subjects, code, times)
        signer = signing_key()
        if signer is not None:
            products = {**subjects, BUNDLE: {"sha256": sha256(self.path)}}
            (self.path.parent / LINK).write_text(seal(_link(start, products), signer) + "\n")

    def _append(
        self,
        build_type: str,
        name: str,
        parameters: Mapping[str, Any],
        facts: Mapping[str, Any],
        subjects: Digests,
        dependencies: Digests,
        times: Sequence[float],
    ) -> None:
        before = read_chain(self.path)
        chained = {f"statement/{last.name}": {"sha256": last.sha256} for last in before[-1:]}
        definition = {
            "buildType": build_type,
            "externalParameters": parameters,
            "internalParameters": facts,
            "resolvedDependencies": descriptors({**dependencies, **chained}),
        }
        metadata = {"invocationId": f"{self.flow_run_id}/{name}"}
        metadata |= dict(zip(("startedOn", "finishedOn"), map(timestamp, times), strict=True))
        details = {"builder": {"id": BUILDER, "version": {"vitprune": vitprune.__version__}}, "metadata": metadata}
        statement = {
            "_type": STATEMENT,
            "subject": descriptors(subjects),
            "predicateType": PROVENANCE,
            "predicate": {"buildDefinition": definition, "runDetails": details},
        }
        line = seal(statement, signing_key())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _link(start: Mapping[str, Any], products: Digests) -> dict[str, Any]:
    """Return the link of in-toto 1.0 for a run: the command and the digests of what it wrote."""
    commit = start.get("git", {}).get("commit")
    return {
        "_type": "link",
        "name": "run",
        "command": ["vitprune", "run"],
        "materials": {},
        "products": products,
        "byproducts": {},
        "environment": {"git_commit": commit} if commit else {},
    }


@dataclass(frozen=True)
class Statement:
    """A statement of a chain.

    Attributes:
        sha256: Digest of the payload.
        name: Stage, or "run".
        flow_run_id: Id of the flow run.
        subjects: Digests of the files that it attests.
        dependencies: Digests of what these were made of.
        parameters: SLSA's externalParameters.
        facts: SLSA's internalParameters.
        started: Start, as ISO 8601 in UTC.
        finished: End, as ISO 8601 in UTC.
    """

    sha256: str
    name: str
    flow_run_id: str
    subjects: Digests
    dependencies: Digests
    parameters: Mapping[str, Any]
    facts: Mapping[str, Any]
    started: str
    finished: str


def read_statement(payload: bytes) -> Statement:
    """Read the payload of an envelope.

    Raises:
        BadInput: it is not a statement of vitprune.
    """
    try:
        content = json.loads(payload)
        definition, details = content["predicate"]["buildDefinition"], content["predicate"]["runDetails"]
        metadata = details["metadata"]
        flow_run_id, _, name = metadata["invocationId"].rpartition("/")
        statement = Statement(
            sha256=hashlib.sha256(payload).hexdigest(),
            name=name,
            flow_run_id=flow_run_id,
            subjects=_digests(content["subject"]),
            dependencies=_digests(definition["resolvedDependencies"]),
            parameters=definition["externalParameters"],
            facts=definition["internalParameters"],
            started=metadata["startedOn"],
            finished=metadata["finishedOn"],
        )
        known = (content["_type"], content["predicateType"], definition["buildType"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{BUNDLE}: has a payload that is not a statement of vitprune; the file was changed") from None
    if known != (STATEMENT, PROVENANCE, RUN_TYPE if name == "run" else STAGE_TYPE):
        raise BadInput(f"{BUNDLE}: the statement {name} has the types {known}; the file was changed")
    return statement


def read_chain(path: Path) -> list[Statement]:
    """Read the statements of a file of envelopes; there are none if the file is missing.

    Raises:
        BadInput: a line is not an envelope, or not a statement of vitprune.
    """
    return [read_statement(envelope.payload) for envelope in read_envelopes(path)] if path.is_file() else []


def _digests(rows: Iterable[Mapping[str, Any]]) -> Digests:
    return {row["name"]: {str(kind): str(value) for kind, value in row["digest"].items()} for row in rows}


def timestamp(seconds: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
