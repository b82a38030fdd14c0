"""MLflow's databases: checked before MLflow opens them, and a SQLite one made whole or not at all."""

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.errors import TrackingError
from sparsetune.files import atomic_path
from sparsetune.locks import exclusive
from sparsetune.urls import sqlite_path, sqlite_url, without_credentials

if TYPE_CHECKING:
    from sqlalchemy import Inspector

ARTIFACTS = "artifacts"

_HOLDERS = ("experiments", "registered_models")
"""Tables on which the rows of all others depend. Creation ends with the first experiment."""

_MIGRATION = "alembic_version"
_QUIET_SECONDS = 15.0
"""A half-made database that was written to since may be one that another process is making."""


def prepare_database(uri: str) -> None:
    """Make a SQLite database that is missing or half-made; raise TrackingError where MLflow can't use a database.

    MLflow itself would try for minutes to open one that is damaged or away, and would leave its tables in one of
    another tool that also migrates by alembic. It creates tables one by one, and can't continue after a kill or on a
    full disk.
    """
    path = sqlite_path(uri)
    if path is None:
        _check(uri)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_missing(path):
        _check(uri)
        if not _is_half_made(path):
            return
    with exclusive(path.with_name(f".{path.name}.lock"), what=f"the creation of {path}", setting="tracking.root"):
        while not _is_missing(path) and _is_half_made(path) and time.time() - path.stat().st_mtime < _QUIET_SECONDS:
            time.sleep(0.5)
        if _is_missing(path) or _is_half_made(path):
            _make(path)


def _is_missing(path: Path) -> bool:
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def _make(path: Path) -> None:
    """Make a database under a temporary name; the journal that a killed process left of its own is removed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    journals = re.compile(rf"\.{re.escape(path.stem)}-[0-9a-f]{{8}}{re.escape(path.suffix)}-journal")
    for left in path.parent.iterdir():
        if journals.fullmatch(left.name) and left.is_file() and not left.is_symlink():
            left.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        try:
            made = SqlAlchemyStore(sqlite_url(temporary), (path.parent / ARTIFACTS).as_uri())  # type: ignore[no-untyped-call]
            made.engine.dispose()
        finally:
            temporary.with_name(f"{temporary.name}-journal").unlink(missing_ok=True)


def _is_half_made(path: Path) -> bool:
    """Whether a SQLite database has tables of MLflow's, no others, and nothing in them."""
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if any(connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in tables & {*_HOLDERS}):
            return False
    return bool(tables) and all(name in _mlflow_tables() or name.startswith("_alembic_tmp_") for name in tables)


def _check(uri: str) -> None:
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    except ValueError as error:  # without its message, which may hold a part of a password
        raise TrackingError(
            f"cannot use the tracking store {without_credentials(uri)}: its port is not a number; correct it"
        ) from error
    _check_tables(without_credentials(uri), sqlalchemy.inspect(engine))


def _check_tables(shown: str, found: "Inspector") -> None:
    tables = set(found.get_table_names())
    if _MIGRATION in tables and not tables & {*_HOLDERS} and tables - _mlflow_tables():
        raise TrackingError(
            f"{shown} is another tool's database: it has the tables {', '.join(sorted(tables)[:3])} ...; give MLflow "
            "one of its own with tracking.uri or MLFLOW_TRACKING_URI"
        )


def _mlflow_tables() -> set[str]:
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as _Registry  # noqa: F401 (its tables)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as _Tracking  # noqa: F401

    return {_MIGRATION, *Base.metadata.tables}
