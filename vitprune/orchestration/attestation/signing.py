"""DSSE envelopes, signed with an Ed25519 key: an OpenSSH key file or PEM.

Source: https://github.com/secure-systems-lab/dsse; the signatures are those of securesystemslib.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error, VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from vitprune.errors import BadInput

SIGNING_KEY, PASSPHRASE = "VITPRUNE_SIGNING_KEY", "VITPRUNE_SIGNING_PASSPHRASE"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"


def signing_key() -> CryptoSigner | None:
    """Return the signer of VITPRUNE_SIGNING_KEY, a private Ed25519 key file; None if the variable is not set.

    Raises:
        BadInput: the file is missing, is not such a key, or VITPRUNE_SIGNING_PASSPHRASE does not decrypt it.
    """
    name = os.environ.get(SIGNING_KEY)
    if not name:
        return None
    passphrase = os.environ.get(PASSPHRASE)
    remedy = f"give a private Ed25519 key (ssh-keygen -t ed25519 -f FILE), and its passphrase in {PASSPHRASE}"
    try:
        content = Path(name).read_bytes()
        load = serialization.load_ssh_private_key if _OPENSSH in content else serialization.load_pem_private_key
        key = load(content, passphrase.encode() if passphrase else None)
    except OSError as error:
        raise BadInput(f"{SIGNING_KEY}: {name}: {error.strerror}; {remedy}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadInput(f"{SIGNING_KEY}: {name}: not a key, or another passphrase; {remedy}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{SIGNING_KEY}: {name}: not an Ed25519 key; {remedy}")
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))


def trusted_keys(path: Path) -> list[SSlibKey]:
    """Read public Ed25519 keys: lines of authorized_keys (`ssh-ed25519 ...`), or PEM blocks.

    Raises:
        BadInput: the file cannot be read, has no key, or has a line that is not such a key.
    """
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a file of public keys") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file; give a file of public keys, one `ssh-ed25519 ...` per line") from None
    blocks = [f"{block}-----END PUBLIC KEY-----\n" for block in text.split("-----END PUBLIC KEY-----")[:-1]]
    lines = [] if blocks else [line.strip() for line in text.splitlines()]
    keys = [_public_key(block, path) for block in (*blocks, *lines) if block and not block.startswith("#")]
    if not keys:
        raise BadInput(f"{path}: has no public key; give one `ssh-ed25519 ...` per line, or PEM")
    return keys


def _public_key(text: str, path: Path) -> SSlibKey:
    content = text.strip().encode()
    load = serialization.load_ssh_public_key if content.startswith(b"ssh-") else serialization.load_pem_public_key
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput(f"{path}: {text.strip()[:40]!r} is not a public Ed25519 key; give `ssh-ed25519 ...` or PEM")
    return SSlibKey.from_crypto(key)


def key_fingerprint(key: SSlibKey) -> str:
    """Return the fingerprint of a key, as `ssh-keygen -l` prints it."""
    raw = bytes.fromhex(key.keyval["public"])
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (b"ssh-ed25519", raw))
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def seal(statement: dict[str, Any], signer: CryptoSigner | None) -> str:
    """Put a statement into an envelope, and sign it.

    Args:
        statement: The in-toto statement.
        signer: None for an envelope without signature.

    Returns:
        The envelope as one line of JSON.
    """
    envelope = Envelope(json.dumps(statement, sort_keys=True, default=str).encode(), PAYLOAD_TYPE, {})
    if signer is not None:
        envelope.sign(signer)
    return json.dumps(envelope.to_dict())


def read_envelopes(path: Path) -> list[Envelope]:
    """Read a file with one envelope per line.

    Raises:
        BadInput: a line is not an envelope of in-toto.
    """
    try:
        envelopes = [Envelope.from_dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, Error):
        raise BadInput(f"{path.name}: has a line that is not a DSSE envelope; the file was changed") from None
    if any(envelope.payload_type != PAYLOAD_TYPE for envelope in envelopes):
        raise BadInput(f"{path.name}: has a payload that is not {PAYLOAD_TYPE}; the file was changed")
    return envelopes


def verified_by(envelope: Envelope, keys: Sequence[SSlibKey]) -> SSlibKey | None:
    """Return the first key that signed the envelope, or None."""
    for key in keys:
        try:
            envelope.verify([key], 1)
        except VerificationError:
            continue
        return key
    return None
