"""Where MLflow keeps its records: the project's own SQLite file, made whole before anything uses it, or a server."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"


def tracking_uri(project: Path) -> str:
    """Return MLFLOW_TRACKING_URI if it is set, else the project's own store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project / DATABASE}"


@contextmanager
def short_patience(seconds: int) -> Iterator[None]:
    """Wait `seconds` at most for an answer of a tracking server and try twice again, where the user has not said more.

    MLflow's own patience is four minutes for one call.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)}
    wanted["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    wanted["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # two lines for each of some twenty runs
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def open_client(project: Path) -> tuple[MlflowClient, str]:
    """Return a client of the store and the experiment's id; the store is made or brought up to date first.

    Call it while holding the lock of the mirror: the first use of a SQLite store is not safe among several processes.

    Raises:
        MlflowException: the server does not answer, or refuses.
    """
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)  # each migration's name says nothing to a user
    uri, own = tracking_uri(project), project / DATABASE
    if uri == f"sqlite:///{own}":
        _make_current(own)
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "vitprune"
    with short_patience(15):  # a server that many flows ask at once is slow to answer
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return client, experiment.experiment_id
        location = (project / ARTIFACTS).as_uri() if uri.startswith("sqlite:") else None
        try:
            return client, client.create_experiment(name, artifact_location=location)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return client, experiment.experiment_id  # another flow has made it in between


def _make_current(database: Path) -> None:
    """Make the SQLite store, or bring it to this MLflow's schema, under another name and rename it.

    A migration that is cut off leaves a file which fails for good.
    """
    if database.exists() and _revision(database) == _head():
        return
    partial = database.with_name(database.name + ".partial")
    partial.unlink(missing_ok=True)
    if database.exists():
        shutil.copyfile(database, partial)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{partial}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MlflowException(f"{database}: cannot be made ready ({(done.stderr.strip().splitlines() or ['?'])[-1]})")
    os.replace(partial, database)


def _revision(database: Path) -> str | None:
    try:
        with closing(sqlite3.connect(database)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError:
        return None
    return None if row is None else str(row[0])


def _head() -> str:
    """Return the schema's revision that this MLflow wants."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    return str(ScriptDirectory(str(Path(db_migrations.__file__).parent)).get_current_head())
