"""Runs and aliases read straight from MLflow's SQLite file: in milliseconds, where importing MLflow takes seconds."""

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_NAMES = "SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC"

_RUNS = """
SELECT runs.run_uuid, runs.name, runs.status, runs.start_time
FROM runs JOIN experiments USING (experiment_id)
WHERE runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'
AND EXISTS (SELECT 1 FROM tags WHERE tags.run_uuid = runs.run_uuid AND tags.key = ? AND tags.value != ?)
ORDER BY runs.start_time DESC
"""

_ALIASES = """
SELECT versions.value, aliases.name, aliases.alias
FROM registered_model_aliases AS aliases
JOIN registered_model_tags AS owner USING (name)
JOIN model_version_tags AS versions ON versions.name = aliases.name AND versions.version = aliases.version
WHERE owner.key = ? AND owner.value = ? AND versions.key IN (?, ?)
ORDER BY aliases.name, aliases.alias
"""


def read_names(database: Path) -> list[tuple[str, str]]:
    """Return id and name of every run, the newest first; sqlite3.Error where there is no database of MLflow's."""
    with closing(_open(database)) as connection:
        rows = connection.execute(_NAMES)
        return [(run_id, name) for run_id, name in rows]


def read_runs(database: Path, tag: str, other_than: str) -> "Iterator[Any]":
    """Yield the runs that have a tag with a value `other_than` this one, the newest first, as MLflow's `Run`.

    Raises sqlite3.Error where the file isn't a database of MLflow's.
    """
    with closing(_open(database)) as connection:
        values = {name: _values(connection, name) for name in ("tags", "params", "latest_metrics")}
        for run_id, name, status, start_time in connection.execute(_RUNS, (tag, other_than)):
            tags, params, metrics = (of_kind.get(run_id, {}) for of_kind in values.values())
            yield SimpleNamespace(
                info=SimpleNamespace(run_id=run_id, run_name=name, status=status, start_time=start_time),
                data=SimpleNamespace(tags=tags, params=params, metrics=metrics),
            )


def read_aliases(database: Path, owner: tuple[str, str], run_tags: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    """Return `NAME@ALIAS` of the models with the tag `owner`, by the runs that their versions name in `run_tags`."""
    found: dict[str, list[str]] = defaultdict(list)
    with closing(_open(database)) as connection:
        for run_id, name, alias in connection.execute(_ALIASES, (*owner, *run_tags)):
            if f"{name}@{alias}" not in found[run_id]:
                found[run_id].append(f"{name}@{alias}")
    return {run_id: tuple(names) for run_id, names in found.items()}


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)


def _values(connection: sqlite3.Connection, table: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    condition = " WHERE NOT is_nan" if table == "latest_metrics" else ""
    for run_id, key, value in connection.execute(f"SELECT run_uuid, key, value FROM {table}{condition}"):
        found[run_id][key] = value
    return found
