"""A team's machinery on loopback: PostgreSQL, Prefect, a worker, MLflow, DVC by SSH; retrained, held back, rolled back.

Everything is started here and ended here. What it needs beyond Python is said where it is missing.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_project
import yaml

from flows.processes import kill_tree

pytestmark = [pytest.mark.pipeline, pytest.mark.team]
REPOSITORY = Path(__file__).parent.parent
SECRETS = {
    "VITPRUNE_DB_PASSWORD": "planted/database-secret",
    "AWS_SECRET_ACCESS_KEY": "planted-cloud-secret",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-secret",
    "MLFLOW_TRACKING_USERNAME": "planted-mlflow-user",
}
LAX = {"max_accuracy_loss": 100.0, "alpha": None}


def missing() -> str:
    """What is not installed here and cannot be done without."""
    found = {
        "PostgreSQL (apt-get install postgresql)": bool(list(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))),
        "sshd (apt-get install openssh-server)": shutil.which("sshd", path="/usr/sbin:/usr/bin") is not None,
        "curl": shutil.which("curl") is not None,
        "psycopg2 (pip install 'vitprune[server]')": importlib.util.find_spec("psycopg2") is not None,
        "dvc-ssh (pip install 'vitprune[server]')": importlib.util.find_spec("dvc_ssh") is not None,
    }
    return ", ".join(name for name, there in found.items() if not there)


@dataclass(frozen=True)
class Team:
    """Servers, and a project that they know."""

    folder: Path
    project: Path
    env: dict[str, str]

    def run(self, *words: str, where: Path | None = None) -> str:
        """Run a Python module as a user would, and return what it printed."""
        command, place = [sys.executable, "-W", "ignore", "-m", *words], where or self.project
        env = self.env | {"PWD": str(place)}  # as a shell says it; prefect.yaml asks for it
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Ask the Prefect server."""
        request = urllib.request.Request(
            self.env["PREFECT_API_URL"] + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def retrain(self) -> str:
        """Schedule a run some seconds ahead, wait until the worker has done it, and return how it ended, in words."""
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
        """The runs of the deployment that were asked for by hand, not by its schedule."""
        wanted = {"deployments": {"name": {"any_": ["retrain"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 50}
        return [run for run in self.ask("/flow_runs/filter", wanted) if not run["auto_scheduled"]]

    def champion(self) -> str:
        """The version that the alias names."""
        lines = self.run("flows.champion", "show").splitlines()
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


ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An SSH server on loopback, for this user and one key; the address of a folder of its own, and the key."""
    if lacks := missing():
        pytest.skip(f"not installed: {lacks}")
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", folder / "config"], stdout=log, stderr=log)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    yield f"ssh://{user}@127.0.0.1:{port}{folder}/store", folder / "user"
    kill_tree(server.pid)
    server.wait()


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, ssh: tuple[str, Path]) -> Iterator[Team]:
    """Servers and a worker by the scripts of deploy/, and a project with a remote, deployed."""
    folder = tmp_path_factory.mktemp("team")
    folder.chmod(0o755)
    for above in list(folder.parents)[:2]:
        above.chmod(0o755)  # PostgreSQL runs as another user when this is root
    ports = {f"VITPRUNE_{name}_PORT": str(free_port()) for name in ("DB", "PREFECT", "MLFLOW")}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    env |= SECRETS | ports | {"VITPRUNE_SERVERS": str(folder / "servers"), "PYTHON": sys.executable}
    env |= {"PREFECT_HOME": str(folder / "client"), "PREFECT_WORKER_QUERY_SECONDS": "2", "DO_NOT_TRACK": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), env.get("PYTHONPATH", "")])
    try:
        up = subprocess.run([REPOSITORY / "deploy/servers", "up"], env=env, capture_output=True, text=True, check=False)
        assert up.returncode == 0, up.stderr
        env |= dict(word.split("=", 1) for word in up.stdout.split() if "=" in word)
        project = prepared(folder / "project", *ssh)
        made = Team(folder, project, env)
        with (folder / "worker.log").open("w") as log:
            worker = subprocess.Popen(
                [REPOSITORY / "deploy/worker", "0"], env=env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for_pool(made)
            made.run("prefect", "--no-prompt", "deploy", "--all")
            yield made
        finally:
            os.killpg(worker.pid, signal.SIGTERM)
            kill_tree(worker.pid)
            worker.wait()
    finally:
        subprocess.run([REPOSITORY / "deploy/servers", "down"], env=env, check=False)


def prepared(project: Path, remote: str, key: Path) -> Path:
    """A project that has run once, by `dvc repro` as far as DVC can tell, and whose images are in DVC's store alone."""
    tiny_project.run_stages(tiny_project.make_of_images(project, size=200))
    tiny_project.dvc(project, "remote", "add", "-d", "team", remote)
    tiny_project.dvc(project, "remote", "modify", "--local", "team", "keyfile", str(key))
    (project / "gates.yaml").write_text(yaml.safe_dump(LAX))
    tiny_project.commit(project, "Name the team's remote.")
    shutil.rmtree(project / "images")
    return project


def wait_for_pool(team: Team) -> None:
    deadline = time.monotonic() + 240
    while not team.ask("/work_pools/filter", {}):
        assert time.monotonic() < deadline, (team.folder / "worker.log").read_text()
        time.sleep(0.5)


def test_a_team_retrains_holds_back_promotes_and_rolls_back(team: Team, ssh: tuple[str, Path]) -> None:
    # the worker makes the first champion at the time that it was scheduled for
    assert "version 1 is champion now" in team.retrain()
    assert team.champion() == "1"
    message = git(team.project, "log", "-1", "--format=%B", "retrain")
    assert "MLflow-Run: " in message
    assert "Data images: " in message
    assert git(team.project, "show", "retrain:dvc.lock").startswith("schema:")
    stored = Path(ssh[0].split("127.0.0.1:")[1].partition("/")[2]).as_posix()
    assert list(Path(f"/{stored}").glob("files/md5/*/*"))
    assert list(Path(f"/{stored}").glob("runs/*/*/*"))  # the cache of runs: others need not compute them

    # the same data again: nothing to do, and no worktree is left over
    assert team.retrain().startswith("nothing to do: version 1 was made of this data and promoted")
    assert list((team.project / ".vitprune/retrain").iterdir()) == []

    # a worse model is held back and kept; the champion stays
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
    assert team.run("flows.champion", "rollback").endswith("version 1 is champion again, in the place of version 3\n")
    assert team.champion() == "1"

    # what the worker has made is audited from another clone, from nothing but the servers and the remote
    (line,) = [line for line in team.run("flows.champion", "show").splitlines() if line.endswith(" champion")]
    run = line.split("run ")[1].split()[0]
    clone = team.folder / "clone"
    subprocess.run(["git", "clone", "-q", str(team.project), str(clone)], check=True)
    subprocess.run(["git", "fetch", "-q", "origin", "retrain"], cwd=clone, check=True)
    shutil.copyfile(team.project / ".dvc/config.local", clone / ".dvc/config.local")
    assert team.run("flows.audit", run, "--project", str(clone), where=team.folder).endswith("PASS\n")
    assert found_secrets(team) == []


def found_secrets(team: Team) -> list[str]:
    """Files in which a planted secret stands, and rows of the databases."""
    words = [value.encode() for value in SECRETS.values()]
    files = [path for path in team.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = [str(path) for path in files if any(word in path.read_bytes() for word in words)]
    (psql,) = list(Path("/usr/lib/postgresql").glob("*/bin/pg_dump"))[-1:]
    for name in ("prefect", "mlflow"):
        address = ["-h", "127.0.0.1", "-p", team.env["VITPRUNE_DB_PORT"], "-U", "vitprune", name]
        env = team.env | {"PGPASSWORD": SECRETS["VITPRUNE_DB_PASSWORD"]}
        dump = subprocess.run([psql, *address], env=env, capture_output=True, check=True).stdout
        assert b"retrain" in dump or b"vitprune" in dump
        found += [name for word in words if word in dump]
    return found


def git(where: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True).stdout
