"""Signing keys, envelopes and the statements of a run."""

import base64
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from google.protobuf.json_format import Parse
from in_toto_attestation.v1.statement import Statement as Validated
from in_toto_attestation.v1.statement_pb2 import Statement as Protobuf

from vitprune.errors import BadInput
from vitprune.orchestration.attestation.signing import (
    PASSPHRASE,
    SIGNING_KEY,
    key_fingerprint,
    read_envelopes,
    seal,
    signing_key,
    trusted_keys,
    verified_by,
)
from vitprune.orchestration.attestation.statements import LINK, Attestation, read_chain
from vitprune.runtime.files import code_digest

PEM, RAW = serialization.Encoding.PEM, serialization.PublicFormat
NO_PASSPHRASE = serialization.NoEncryption()
FACT = {"stage": "dataset", "started": 1000.5, "seconds": 2.25, "cached": False}
ENTRY = {"cmd": "vitprune dataset", "params": {"params.yaml": {"seed": 0}}}


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create an SSH key that signs all later runs."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    monkeypatch.setenv(SIGNING_KEY, str(path))
    return path


def attest(folder: Path) -> Attestation:
    """Attest a run of two stages."""
    attestation = Attestation(folder / "attestation.jsonl", "run-1")
    attestation.add_stage(FACT, ENTRY, {"data/manifest.parquet": {"md5": "0" * 32}}, {"images": {"md5": "1" * 32}})
    attestation.add_stage(FACT | {"stage": "dense"}, ENTRY, {"out/dense": {"md5": "2" * 32}}, {})
    start = {"time": 1000.0, "git": {"commit": "c" * 40}, "versions": {"torch": "2.15.0"}}
    attestation.close(start, {"status": "FINISHED", "error": "", "time": 1010.0}, {"dvc.lock": {"sha256": "3" * 64}})
    return attestation


def test_a_run_is_a_chain_of_valid_statements(tmp_path: Path) -> None:
    path = attest(tmp_path).path
    chain = read_chain(path)
    assert [statement.name for statement in chain] == ["dataset", "dense", "run"]
    assert {statement.flow_run_id for statement in chain} == {"run-1"}
    for before, statement in pairwise(chain):
        assert statement.dependencies[f"statement/{before.name}"] == {"sha256": before.sha256}
    assert chain[0].parameters == {"command": "vitprune dataset", "params": {"seed": 0}}
    assert (chain[0].started, chain[0].finished) == ("1970-01-01T00:16:40.500Z", "1970-01-01T00:16:42.750Z")
    assert chain[2].dependencies["git"] == {"gitCommit": "c" * 40}
    assert not (tmp_path / LINK).exists()  # without a key
    for envelope in read_envelopes(path):  # the library of the in-toto project accepts them
        Validated.copy_from_pb(Parse(envelope.payload, Protobuf())).validate()
        assert envelope.signatures == {}


def test_signatures_of_a_trusted_key_are_verified(key: Path, tmp_path: Path) -> None:
    path = attest(tmp_path).path
    (trusted,) = trusted_keys(key.with_suffix(".pub"))
    assert all(verified_by(envelope, [trusted]) == trusted for envelope in read_envelopes(path))
    printed = subprocess.run(["ssh-keygen", "-lf", str(key)], capture_output=True, text=True, check=True).stdout
    assert key_fingerprint(trusted) == printed.split()[1]
    other = Ed25519PrivateKey.generate().public_key().public_bytes(PEM, RAW.SubjectPublicKeyInfo)
    (tmp_path / "other.pem").write_bytes(other)
    (stranger,) = trusted_keys(tmp_path / "other.pem")
    assert verified_by(read_envelopes(path)[0], [stranger]) is None
    assert verified_by(read_envelopes(path)[0], [stranger, trusted]) == trusted
    content = json.loads(path.read_text().splitlines()[0])
    payload = base64.b64decode(content["payload"]).replace(b'"seed": 0', b'"seed": 1')
    path.write_text(json.dumps(content | {"payload": base64.b64encode(payload).decode()}) + "\n")
    assert verified_by(read_envelopes(path)[0], [trusted]) is None


def test_the_command_line_of_in_toto_verifies_a_signed_run(key: Path, tmp_path: Path) -> None:
    attest(tmp_path)

    def verify(name: str) -> int:
        command = [str(Path(sys.executable).with_name("in-toto-sign")), "--verify", "-f", LINK, "-k", name]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    public = serialization.load_ssh_public_key(key.with_suffix(".pub").read_bytes())
    (tmp_path / "key.pem").write_bytes(public.public_bytes(PEM, RAW.SubjectPublicKeyInfo))
    other = Ed25519PrivateKey.generate().public_key()
    (tmp_path / "other.pem").write_bytes(other.public_bytes(PEM, RAW.SubjectPublicKeyInfo))
    assert (verify("key.pem"), verify("other.pem")) == (0, 1)


@pytest.mark.parametrize("form", ["ssh", "pem", "encrypted"])
def test_forms_of_private_keys(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = Ed25519PrivateKey.generate()
    locked = serialization.BestAvailableEncryption(b"secret")
    layout = serialization.PrivateFormat.PKCS8 if form == "pem" else serialization.PrivateFormat.OpenSSH
    path = tmp_path / "key"
    path.write_bytes(private.private_bytes(PEM, layout, locked if form == "encrypted" else NO_PASSPHRASE))
    monkeypatch.setenv(SIGNING_KEY, str(path))
    if form == "encrypted":
        with pytest.raises(BadInput, match=f"not a key, or another passphrase.*{PASSPHRASE}"):
            signing_key()
        monkeypatch.setenv(PASSPHRASE, "secret")
    line = seal({"a": 1}, signing_key())
    assert len(json.loads(line)["signatures"]) == 1


def test_unusable_keys_give_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rsa, path = generate_private_key(65537, 1024), tmp_path / "key"
    monkeypatch.setenv(SIGNING_KEY, str(path))
    with pytest.raises(BadInput, match="No such file"):
        signing_key()
    path.write_bytes(rsa.private_bytes(PEM, serialization.PrivateFormat.PKCS8, NO_PASSPHRASE))
    with pytest.raises(BadInput, match="not an Ed25519 key"):
        signing_key()
    path.write_bytes(rsa.public_key().public_bytes(PEM, RAW.SubjectPublicKeyInfo))
    with pytest.raises(BadInput, match="is not a public Ed25519 key"):
        trusted_keys(path)
    with pytest.raises(BadInput, match="not a key"):
        signing_key()
    monkeypatch.delenv(SIGNING_KEY)
    assert signing_key() is None


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "ssh-ed25519 AAAA\n", "words\n", "-----BEGIN PUBLIC KEY-----\n", "é"]
)
def test_files_without_a_public_key_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(BadInput, match=str(tmp_path / "keys")):
        trusted_keys(tmp_path / "keys")


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{", "{}", '{"payload": "!", "payloadType": "x", "signatures": []}',
     '{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [1]}',
     '{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
     '{"payload": "W10=", "payloadType": "application/vnd.in-toto+json", "signatures": []}', "[" * 100000],
)  # fmt: skip
def test_a_changed_attestation_file_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "attestation.jsonl").write_text(line + "\n")
    with pytest.raises(BadInput, match="the file was changed"):
        read_chain(tmp_path / "attestation.jsonl")


def test_the_digest_of_code_changes_with_a_file_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1\n")
    digests = {code_digest(tmp_path)}
    (tmp_path / "notes.txt").write_text("not code\n")
    digests.add(code_digest(tmp_path))
    assert len(digests) == 1
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    digests.add(code_digest(tmp_path))
    (tmp_path / "b.py").write_text("2\n")
    digests.add(code_digest(tmp_path))
    assert len(digests) == 3
