"""MLflow's tracking store: the project's SQLite file (created or migrated before its first use) or a server."""

import logging
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from vitprune.errors import BadInput
from vitprune.runtime.commands import captured, error_line
from vitprune.runtime.messages import first_line
from vitprune.runtime.untrusted import without_credentials

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
# MLflow 3 opens an experiment without a kind as one of generative AI, with empty pages for traces
KIND = {"mlflow.experimentKind": "custom_model_development"}


class TrackingError(BadInput):
    """MLflow does not answer, or rejects a request."""


def tracking_uri(project: Path) -> str:
    """Return MLFLOW_TRACKING_URI if it is set, else the URI of the project's SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project / DATABASE}"


def require_store(project: Path) -> None:
    """Refuse a project without an MLflow store, which MLflow would create.

    Raises:
        BadInput: MLFLOW_TRACKING_URI is not set, and the project has no database.
    """
    local = project / DATABASE
    if tracking_uri(project) == f"sqlite:///{local}" and not local.is_file():
        raise BadInput(f"{local}: no such file; give the project by --project, or set MLFLOW_TRACKING_URI")


@contextmanager
def short_timeouts(seconds: int) -> Iterator[None]:
    """Limit MLflow's HTTP timeout to `seconds` and its retries to 2, unless the user has set them.

    MLflow's default is about four minutes for one call.
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


@contextmanager
def mlflow_session(project: Path) -> Iterator[None]:
    """Limit MLflow's timeouts to a minute, and turn its errors into one line without credentials.

    Raises:
        TrackingError: MLflow does not answer, or rejects a request.
    """
    with short_timeouts(60):
        try:
            yield
        except MlflowException as error:
            line = f"MLflow at {tracking_uri(project)}: {first_line(error)}; check MLFLOW_TRACKING_URI and the server"
            raise TrackingError(without_credentials(line)) from None


def open_client(project: Path) -> tuple[MlflowClient, str]:
    """Create or migrate the store if it is the project's, and return a client and the id of the experiment.

    Call it while holding the upload lock: creating a SQLite store is not safe among several processes.

    Raises:
        TrackingError: the project's database is damaged, or its path cannot be an address.
        MlflowException: the server does not answer, or rejects the request.
    """
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)  # no log line per migration
    uri, local = tracking_uri(project), project / DATABASE
    if uri == f"sqlite:///{local}":
        if "?" in str(local):  # the rest would be options of the address, and the database another file
            raise TrackingError(
                f"{project}: MLflow takes no ? in the path; rename the folder, or set MLFLOW_TRACKING_URI"
            )
        if local.exists() and (damage := _damage(local)):
            raise TrackingError(
                f"{local}: the database is damaged ({damage}); move it away and run "
                f"`vitprune sync --project {project}`: the runs are written again from the run logs"
            )
        create_or_migrate(local)
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "vitprune"
    with short_timeouts(15):  # a server under load is slow to answer
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = (project / ARTIFACTS).as_uri() if uri.startswith("sqlite:") else None
            try:
                return client, client.create_experiment(name, artifact_location=location, tags=KIND)
            except MlflowException:  # another flow may have created it in between
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return client, experiment.experiment_id


def find_run(client: MlflowClient, experiment: str, tag: str, value: str) -> Run | None:
    """Return the run of an experiment with a tag, or None.

    Args:
        client: Client of the tracking store.
        experiment: Id of the experiment.
        tag: Name of the tag.
        value: Its value.
    """
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
    return runs[0] if runs else None


def create_or_migrate(database: Path) -> None:
    """Create the SQLite store, or migrate a copy to this MLflow's schema, and rename it.

    A migration that is interrupted leaves a file that cannot be migrated again.
    """
    if database.exists() and _revision(database) == _head():
        return
    partial = database.with_name(database.name + ".partial")
    partial.unlink(missing_ok=True)
    if database.exists():
        shutil.copyfile(database, partial)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{partial}"]
    completed = captured(command, Path(), os.environ)
    if completed.returncode != 0:
        raise MlflowException(f"{database}: migration to the schema of this MLflow failed ({error_line(completed)})")
    os.replace(partial, database)


def _damage(database: Path) -> str:
    """Return the first damage of a SQLite file; empty if it is intact or cannot be checked now."""
    try:
        with closing(sqlite3.connect(database)) as connection:
            result = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except sqlite3.OperationalError:  # locked by a process that writes
        return ""
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if result == "ok" else result.splitlines()[0]


def _revision(database: Path) -> str | None:
    try:
        with closing(sqlite3.connect(database)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError:
        return None
    return None if row is None else str(row[0])


def _head() -> str:
    """Return the schema revision of this MLflow."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    return str(ScriptDirectory(str(Path(db_migrations.__file__).parent)).get_current_head())
