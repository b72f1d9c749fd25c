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
        BadInput: the address contains a password, DVC does not support it, or its package is not installed.
    """
    scheme = kind(address)
    if scheme is None:
        return os.path.abspath(address)
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in sorted(PACKAGES))
        raise BadInput(f"--remote {scheme}://: unknown; give a folder, or an address with one of {known}")
    parts = urlsplit(address)
    if parts.password is not None:
        shown = address.replace(f":{parts.password}@", ":...@", 1)
        raise BadInput(
            f"--remote {shown}: contains a password, which git would store; use a key or environment variables"
        )
    if not parts.netloc:
        raise BadInput(f"--remote {address}: has no {'host' if scheme == 'ssh' else 'bucket'}")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise BadInput(f"--remote {address}: needs {PACKAGES[scheme]}; pip install 'dvc[{scheme}]'")
    return address


def kind(address: str) -> str | None:
    """Return the scheme of an address in lower case, or None if it is a path."""
    return address.partition("://")[0].lower() if "://" in address else None
