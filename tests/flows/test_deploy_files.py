"""Refusals of deploy/servers, and the required secrets of compose.yaml; nothing is started."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.servers import REPOSITORY

COMPOSE = REPOSITORY / "deploy/compose.yaml"
DB = {"VITPRUNE_DB_PASSWORD": "db"}
PREFECT, MLFLOW = "PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_AUTH_ADMIN_PASSWORD"
KEYS = DB | {PREFECT: "team:0123456789ab", MLFLOW: "0123456789ab"}


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({}, "VITPRUNE_DB_PASSWORD is not set"),
        (DB, f"{PREFECT} is not set"),
        (DB | {"VITPRUNE_HOST": "0.0.0.0"}, f"{PREFECT} is not set"),
        (DB | {PREFECT: KEYS[PREFECT]}, f"{MLFLOW} is not set"),
        (DB | {MLFLOW: KEYS[MLFLOW]}, f"{PREFECT} is not set"),
        (KEYS | {PREFECT: "0123456789abcdef"}, f"{PREFECT} must be USER:PASSWORD"),
        (KEYS | {PREFECT: ":0123456789ab"}, f"{PREFECT} must be USER:PASSWORD"),
        (KEYS | {PREFECT: "a-long-user-name:short"}, f"{PREFECT}: the password has 5 characters; give at least 12"),
        (KEYS | {MLFLOW: "short"}, f"{MLFLOW}: the password has 5 characters; give at least 12"),
        (DB | {"VITPRUNE_WITHOUT_KEYS": "1", "VITPRUNE_HOST": "0.0.0.0"}, "VITPRUNE_WITHOUT_KEYS is only for loopback"),
        (
            DB | {"VITPRUNE_WITHOUT_KEYS": "1", "VITPRUNE_HOST": "10.0.0.1"},
            "VITPRUNE_WITHOUT_KEYS is only for loopback",
        ),
        (DB | {"VITPRUNE_WITHOUT_KEYS": "1", "VITPRUNE_HOST": "::"}, "VITPRUNE_WITHOUT_KEYS is only for loopback"),
    ],
)
def test_servers_without_keys_are_refused(tmp_path: Path, env: dict[str, str], line: str) -> None:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "VITPRUNE"))
    }
    folder = tmp_path / "servers"
    command = [REPOSITORY / "deploy/servers", "up"]
    done = subprocess.run(
        command, env=inherited | env | {"VITPRUNE_SERVERS": str(folder)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {line}")
    assert done.stderr.count("\n") == 1
    assert not folder.exists()


def test_compose_requires_every_secret_and_has_no_password_in_an_address() -> None:
    text = COMPOSE.read_text()
    optional = set(re.findall(r"\$\{(\w+)\b(?!:\?)[^}]*\}", re.sub(r"^#.*$", "", text, flags=re.MULTILINE)))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert optional - required == {"VITPRUNE_MLFLOW_HOSTS"}
    assert {PREFECT, MLFLOW, "VITPRUNE_DB_PASSWORD", "PREFECT_SERVER_ENCRYPTION_KEY"} <= required
    services = yaml.safe_load(text)["services"]
    values = [str(value) for service in services.values() for value in service["environment"].values()]
    assert not [value for value in values if "://" in value and "$" in value]
    assert "*" not in services["mlflow"]["command"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))
