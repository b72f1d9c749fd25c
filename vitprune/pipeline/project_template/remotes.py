"""Validate the DVC remote of a new project: a folder, or an address with a DVC package."""

import importlib.util
import os
from urllib.parse import urlsplit

from vitprune.errors import BadInput

NAME = "team"
PACKAGES = {"azure": "dvc_azure", "gs": "dvc_gs", "s3": "dvc_s3", "ssh": "dvc_ssh"}


def located(address: str) -> str:
    """Return the address of a remote for DVC; a path is relative to the current directory and becomes absolute.

    Raises:
        BadInput: the address contains a secret, DVC does not support it, or its package is not installed.
    """
    scheme = kind(address)
    if scheme is None:
        return os.path.abspath(address)
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in sorted(PACKAGES))
        raise BadInput(f"--remote {scheme}://: unknown; give a folder, or an address with one of {known}")
    try:
        parts = urlsplit(address)
        user, password = parts.username, parts.password
    except ValueError as error:
        raise BadInput(f"--remote {scheme}://: not an address ({error})") from None
    if password is not None or (user is not None and scheme != "ssh"):
        shown = f"{scheme}://...@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise BadInput(
            f"--remote {shown}: contains a password or key, which git would store; use a key file or the environment"
        )
    if parts.query or parts.fragment or "?" in address or "#" in address:
        raise BadInput(
            f"--remote {scheme}://{parts.netloc}{parts.path}: contains a query or fragment, such as a signature, which "
            "git would store; leave it out and use environment variables"
        )
    if not parts.netloc:
        raise BadInput(f"--remote {address}: has no {'host' if scheme == 'ssh' else 'bucket'}")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise BadInput(f"--remote {address}: needs {PACKAGES[scheme]}; pip install 'dvc[{scheme}]'")
    return address


def kind(address: str) -> str | None:
    """Return the scheme of an address in lower case, or None if it is a path."""
    return address.partition("://")[0].lower() if "://" in address else None
