"""The team deployment on loopback (PostgreSQL, Prefect, worker, MLflow, DVC over SSH): retraining, promotion, rollback.

The tests start and stop all servers. Packages that are missing are named in the reason for skipping.
"""

import contextlib
import http.server
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import servers, tiny_project
from vitprune.orchestration.prefect_setup import server_answers

pytestmark = [pytest.mark.pipeline, pytest.mark.team]
PLANTED = b"planted"
SECRETS = {
    "VITPRUNE_DB_PASSWORD": "planted/database-secret",
    "AWS_SECRET_ACCESS_KEY": "planted-cloud-secret",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "planted-mlflow-secret",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-secret",
    "PREFECT_SERVER_API_AUTH_STRING": r'team:planted-"prefect\"-secret',
    "PREFECT_API_AUTH_STRING": r'team:planted-"prefect\"-secret',
}
USER = {"MLFLOW_TRACKING_USERNAME": "admin"}
ZOMBIES = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "VITPRUNE_ZOMBIE_SECONDS": "60"}
SCHEDULER = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10"}
LAX = {"max_accuracy_loss": 100.0, "alpha": None}


@dataclass(frozen=True)
class Team:
    """The servers and the deployed project."""

    folder: Path
    project: Path
    servers: servers.Servers

    def run(self, *words: str, where: Path | None = None) -> str:
        """Run a Python module as a user would; return its output."""
        return self.servers.run(*words, where=where or self.project)

    def retrain(self) -> str:
        """Schedule a run, wait until the worker has executed it, and return its state and message."""
        before = {run["id"] for run in self.runs()}
        self.run("prefect", "--no-prompt", "deployment", "run", "retrain/retrain", "--start-in", "3 seconds")
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            time.sleep(0.5)
            with contextlib.suppress(OSError):  # a server that is slow to answer is asked again
                ended = [run for run in self.runs() if run["id"] not in before and run["state_type"] in ENDED]
                if ended:
                    assert ended[0]["state_type"] == "COMPLETED", ended[0]["state"]
                    return str(ended[0]["state"]["message"])
        raise AssertionError((self.folder / "worker.log").read_text()[-3000:])

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs of the deployment that were started manually."""
        query = {"deployments": {"name": {"any_": ["retrain"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 50}
        return [run for run in self.servers.ask("/flow_runs/filter", query) if not run["auto_scheduled"]]

    def champion(self) -> str:
        """Return the version with the alias champion."""
        lines = self.run("vitprune.cli", "versions").splitlines()
        return next((line.split(":")[0].split()[1] for line in lines if line.endswith(" champion")), "")

    def set(self, gates: dict[str, Any] | None = None, **prune: Any) -> None:
        """Change gates.yaml and params.yaml, and commit."""
        if gates is not None:
            (self.project / "gates.yaml").write_text(yaml.safe_dump(gates))
        path = self.project / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params["prune"] |= prune
        path.write_text(yaml.safe_dump(params, sort_keys=False))
        tiny_project.commit(self.project, "Change what is asked for.")


@dataclass(frozen=True)
class Webhook:
    """Address of the webhook and the messages received."""

    address: str
    messages: list[str]


ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Remote]:
    if lacks := servers.missing():
        pytest.skip(f"not installed: {lacks}")
    with servers.remote(tmp_path_factory.mktemp("ssh") / "remote") as made:
        yield made


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    """Start a webhook server that stores its messages."""
    messages: list[str] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Webhook(f"http://127.0.0.1:{server.server_port}/planted-webhook-secret", messages)
        server.shutdown()


@pytest.fixture(scope="module")
def team(shared_project: Path, remote: servers.Remote, webhook: Webhook) -> Iterator[Team]:
    """Servers and a worker by the scripts of deploy/, and a project with a remote, deployed.

    The folder is outside of pytest's, to which other pytest processes deny access for the user of PostgreSQL.
    """
    with contextlib.ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="vitprune-team-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(made))
        running = stack.enter_context(
            servers.serving(folder, SECRETS | USER | ZOMBIES | SCHEDULER | {"VITPRUNE_WEBHOOK": webhook.address})
        )
        project = prepared(shared_project, folder / "project", remote)
        with running.worker(folder / "worker.log"):
            running.run("prefect", "--no-prompt", "deploy", "--all", where=project)
            yield Team(folder, project, running)


def prepared(finished: Path, project: Path, remote: servers.Remote) -> Path:
    """Create a project whose stages have run as by `dvc repro`, with images only in DVC's cache."""
    shutil.copytree(finished, project, symlinks=True)
    tiny_project.add_remote(project, remote.address, remote.key)
    (project / "gates.yaml").write_text(yaml.safe_dump(LAX))
    in_half_a_day(project)
    tiny_project.commit(project, "Name the team's remote.")
    shutil.rmtree(project / "images")
    return project


def in_half_a_day(project: Path) -> None:
    """Return a cron schedule that is not due during the test."""
    path, hour = project / "prefect.yaml", (datetime.now(UTC).hour + 12) % 24
    path.write_text(path.read_text().replace('cron: "0 3 * * *"', f'cron: "0 {hour} * * *"'))


def test_retrain_promotes_or_rejects_a_model_and_rollback_restores_the_former(
    team: Team, remote: servers.Remote
) -> None:
    # the worker creates the first champion at its scheduled time
    assert "version 1 is champion now" in team.retrain()
    assert team.champion() == "1"
    message = git(team.project, "log", "-1", "--format=%B", "retrain")
    assert "MLflow-Run: " in message
    assert "Data images: " in message
    assert git(team.project, "show", "retrain:dvc.lock").startswith("schema:")
    assert list(remote.store.glob("files/md5/*/*"))
    assert list(remote.store.glob("runs/*/*/*"))  # the run cache, from which others get the results

    # the same data again: nothing is computed, and no worktree remains
    assert team.retrain().startswith("nothing to do: version 1 was made of this data and promoted")
    assert list((team.project / ".vitprune/retrain").iterdir()) == []

    # a worse model is registered but not promoted; the champion does not change
    team.set({"max_accuracy_loss": 0.0, "alpha": 0.05, "max_size": 1000}, sparsity={"ffn": 0.9, "attention": 0.75})
    held = team.retrain()
    assert held.startswith("version 2 is held back: ")
    assert "size is" in held
    (kept,) = (team.project / ".vitprune/retrain").iterdir()
    assert (kept / "out/distill/model.safetensors").is_file()
    assert team.champion() == "1"
    assert team.retrain().startswith("nothing to do: version 2 was made of this data and held back")

    # with other gates it is promoted, from the cache alone; then rolled back by one command
    team.set(LAX)
    assert "version 3 is champion now" in team.retrain()
    assert team.champion() == "3"
    assert team.run("vitprune.cli", "rollback").endswith("version 1 is champion again, in place of version 3\n")
    assert team.champion() == "1"

    # the worker's run is audited from another clone, with the servers and the remote only
    (line,) = [line for line in team.run("vitprune.cli", "versions").splitlines() if line.endswith(" champion")]
    run = line.split("run ")[1].split()[0]
    clone = team.folder / "clone"
    subprocess.run(["git", "clone", "-q", str(team.project), str(clone)], check=True)
    subprocess.run(["git", "fetch", "-q", "origin", "retrain"], cwd=clone, check=True)
    shutil.copyfile(team.project / ".dvc/config.local", clone / ".dvc/config.local")
    assert team.run("vitprune.cli", "audit", run, "--project", str(clone), where=team.folder).endswith("PASS\n")
    assert found_secrets(team) == []


def test_servers_require_credentials(team: Team) -> None:
    prefect, mlflow = (team.servers.env[name] for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"))
    requests = {f"{prefect}/flow_runs/filter": b"{}", f"{mlflow}/api/2.0/mlflow/registered-models/search": None}
    for address, body in requests.items():
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        with error.value as refused:
            assert refused.code == 401, address


def test_files_of_the_servers_can_be_read_only_by_their_user(team: Team) -> None:
    files = [path for path in team.servers.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"mlflow.log", "prefect.log"} <= {path.name for path in files}
    assert [path for path in files if path.stat().st_mode & 0o077] == []
    for name in ("artifacts", "postgres"):
        assert (team.servers.folder / name).stat().st_mode & 0o077 == 0, name


def test_the_server_schedules_runs_by_cron(team: Team) -> None:
    deadline = time.monotonic() + 180
    query = {
        "deployments": {"name": {"any_": ["retrain"]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    while not (planned := team.servers.ask("/flow_runs/filter", query)):
        assert time.monotonic() < deadline, "nothing is planned"
        time.sleep(1)
    due = sorted(datetime.fromisoformat(run["expected_start_time"]) for run in planned)
    assert due[0] > datetime.now(UTC)
    assert {(later - earlier).total_seconds() for earlier, later in itertools.pairwise(due)} == {86400.0}


def test_a_run_without_heartbeat_is_set_to_crashed_and_reported(team: Team, webhook: Webhook) -> None:
    flow = "import time, prefect; prefect.flow(lambda: time.sleep(600), name='victim')()"
    victim = subprocess.Popen([sys.executable, "-W", "ignore", "-c", flow], env=team.servers.env)
    try:
        wait_for_state(team, "RUNNING")
    finally:
        victim.kill()
        victim.wait()
    assert "No heartbeat" in wait_for_state(team, "CRASHED")
    failing = "import prefect; prefect.flow(lambda: 1 / 0, name='\"loser\"', flow_run_name='<b>')()"
    assert subprocess.run([sys.executable, "-c", failing], env=team.servers.env, capture_output=True).returncode
    deadline = time.monotonic() + 60
    while len(webhook.messages) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [line.split()[0] for line in webhook.messages] == ["victim", '"loser"']
    assert "is Crashed: No heartbeat" in webhook.messages[0]
    assert '"loser" <b> is Failed: Flow run encountered an exception: ZeroDivisionError' in webhook.messages[1]


def test_a_killed_database_is_detected_and_killed_servers_restart(team: Team) -> None:
    address = team.servers.env["PREFECT_API_URL"]
    assert server_answers(address)
    team.servers.kill("db")
    assert not server_answers(address)
    for name in ("prefect", "mlflow"):
        team.servers.kill(name)
    team.servers.up()  # immediately, while killed processes may still be zombies
    assert server_answers(address)
    assert team.champion() in ("", "1")


def wait_for_state(team: Team, expected: str) -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(1)
        for run in team.servers.ask("/flow_runs/filter", {"flows": {"name": {"any_": ["victim"]}}}):
            if run["state_type"] == expected:
                return str(run["state"]["message"])
    raise AssertionError(f"the run is not {expected}")


def found_secrets(team: Team) -> list[str]:
    """Return the files and databases that contain a planted secret."""
    files = [path for path in team.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    result = [str(path) for path in files if PLANTED in path.read_bytes()]
    (psql,) = list(Path("/usr/lib/postgresql").glob("*/bin/pg_dump"))[-1:]
    for name in ("prefect", "mlflow"):
        address = ["-h", "127.0.0.1", "-p", team.servers.env["VITPRUNE_DB_PORT"], "-U", "vitprune", name]
        env = team.servers.env | {"PGPASSWORD": SECRETS["VITPRUNE_DB_PASSWORD"]}
        dump = subprocess.run([psql, *address], env=env, capture_output=True, check=True).stdout
        assert b"retrain" in dump or b"vitprune" in dump
        result += [name] * (PLANTED in dump)
    return result


def git(where: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True).stdout
