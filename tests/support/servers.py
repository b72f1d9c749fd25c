"""Servers of deploy/ on loopback: started, killed one by one, restarted and stopped."""

import base64
import contextlib
import getpass
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vitprune.orchestration.execution.processes import kill_tree

REPOSITORY = Path(__file__).parents[2]
PORTS = {name: f"VITPRUNE_{name.upper()}_PORT" for name in ("db", "prefect", "mlflow")}


def missing() -> str:
    """Return the required packages that are not installed."""
    result = {
        "PostgreSQL (apt-get install postgresql)": bool(list(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))),
        "sshd (apt-get install openssh-server)": shutil.which("sshd", path="/usr/sbin:/usr/bin") is not None,
        "curl": shutil.which("curl") is not None,
        "psycopg2 (pip install 'vitprune[server]')": importlib.util.find_spec("psycopg2") is not None,
        "dvc-ssh (pip install 'vitprune[server]')": importlib.util.find_spec("dvc_ssh") is not None,
    }
    return ", ".join(name for name, there in result.items() if not there)


@dataclass(frozen=True)
class Servers:
    """PostgreSQL, Prefect and MLflow in a directory; `env` is the environment of their clients."""

    folder: Path
    env: dict[str, str]

    def up(self) -> None:
        """Start the servers that are not running."""
        done = subprocess.run(
            [REPOSITORY / "deploy/servers", "up"], env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.env.update(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def down(self) -> None:
        """Stop all servers."""
        subprocess.run([REPOSITORY / "deploy/servers", "down"], env=self.env, check=False)

    def kill(self, name: str) -> None:
        """Kill a server (SIGKILL): db, prefect or mlflow, with its children if it leads a process group."""
        if name == "db":
            pid = int((self.folder / "postgres/postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
        else:
            pid = int((self.folder / f"{name}.pid").read_text())
            os.killpg(pid, signal.SIGKILL)
        wait_until_dead(pid)

    def run(self, *words: str, where: Path) -> str:
        """Run a Python module as a user would; return its output."""
        env = self.env | {"PWD": str(where)}  # set by a shell, and used in prefect.yaml
        command = [sys.executable, "-W", "ignore", "-m", *words]
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request to the Prefect server."""
        headers = {"Content-Type": "application/json"}
        if key := self.env.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = f"Basic {base64.b64encode(key.encode()).decode()}"
        request = urllib.request.Request(self.env["PREFECT_API_URL"] + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as output:
            return json.load(output)

    @contextlib.contextmanager
    def worker(self, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a worker of the pool `gpu` in a new process group."""
        with log.open("a") as file:
            process = subprocess.Popen(
                [REPOSITORY / "deploy/worker", "0"], env=self.env, stdout=file, stderr=file, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 240
            while not self.ask("/work_pools/filter", {}):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            kill_tree(process.pid)
            process.wait()


@contextlib.contextmanager
def serving(folder: Path, extra: Mapping[str, str]) -> Iterator[Servers]:
    """Run servers until the end of the block; `extra` are further variables of their environment and their clients'.

    If this process is root, PostgreSQL runs as another user, which needs access to the parent folders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for directory in [folder, *list(folder.parents)[:3]]:
        if directory.stat().st_uid == os.getuid():
            directory.chmod(directory.stat().st_mode | 0o011)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    env |= {name: str(free_port()) for name in PORTS.values()}
    env |= {"VITPRUNE_SERVERS": str(folder / "servers"), "PYTHON": sys.executable, "DO_NOT_TRACK": "1"}
    env |= {"PREFECT_HOME": str(folder / "client"), "PREFECT_WORKER_QUERY_SECONDS": "2"}
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    keys = {"VITPRUNE_DB_PASSWORD": "on loopback"}
    if "MLFLOW_AUTH_ADMIN_PASSWORD" not in extra:
        keys["VITPRUNE_WITHOUT_KEYS"] = "1"
    servers = Servers(folder / "servers", env | keys | dict(extra))
    try:
        servers.up()
        yield servers
    finally:
        servers.down()


@dataclass(frozen=True)
class Remote:
    """A directory reachable by SSH, for this user and one key."""

    folder: Path
    port: int
    running: list["subprocess.Popen[bytes]"]

    @property
    def address(self) -> str:
        """The address in DVC's format."""
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.store}"

    @property
    def store(self) -> Path:
        """The directory itself."""
        return self.folder / "store"

    @property
    def key(self) -> Path:
        """The private key."""
        return self.folder / "user"

    def plug(self) -> None:
        """Start the SSH server and wait until it listens."""
        with (self.folder / "log").open("a") as log:
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", self.folder / "config"]
            self.running.append(subprocess.Popen(command, stdout=log, stderr=log))
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
                return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def unplug(self) -> None:
        """Stop the SSH server with all its connections."""
        while self.running:
            server = self.running.pop()
            kill_tree(server.pid)
            server.wait()


@contextlib.contextmanager
def remote(folder: Path) -> Iterator[Remote]:
    """Start a DVC remote over SSH in its own directory; stop it at the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Remote(folder, free_port(), [])
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "config").write_text(
        f"Port {made.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    made.plug()
    try:
        yield made
    finally:
        made.unplug()


@contextlib.contextmanager
def bucket(log: Path) -> Iterator[dict[str, str]]:
    """Start an S3 server with the bucket `team`; yield the settings of its clients."""
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_DEFAULT_REGION": "eu-central-1"}
    env |= {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "on loopback"}
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", env["AWS_ENDPOINT_URL"].rpartition(":")[2]]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        make = urllib.request.Request(f"{env['AWS_ENDPOINT_URL']}/team", method="PUT")
        while True:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(make, timeout=30):
                break
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield env
    finally:
        server.terminate()
        server.wait()


def wait_until_dead(pid: int) -> None:
    """Wait until a process has ended; zombies count as ended."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} does not end"
            time.sleep(0.05)


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
