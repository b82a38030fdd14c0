"""A local store whose folder was moved or copied: MLflow keeps the absolute addresses of artifacts."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sparsetune.tracking.database import ARTIFACTS

_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def former_places(database: Path) -> tuple[str, ...]:
    """Return the `file:` URIs of folders elsewhere that a store reads and writes artifacts in, though it has its own.

    Raises sqlite3.Error where the file isn't a database of MLflow's.
    """
    own = database.parent / ARTIFACTS
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        locations = [str(location) for (location,) in connection.execute("SELECT artifact_location FROM experiments")]
    parts = [location.rpartition("/") for location in locations if location.startswith("file:")]
    return tuple(
        dict.fromkeys(
            root
            for root, _, name in parts
            if root.endswith(f"/{ARTIFACTS}") and root != own.as_uri() and (own / unquote(name)).is_dir()
        )
    )


def moved_text(places: tuple[str, ...]) -> str:
    """What is wrong with a store that has `former_places`, and what to do."""
    folders = ", ".join(unquote(urlsplit(place).path) for place in places)
    return (
        f"the store was moved or copied: it reads and writes artifacts in {folders}, though it has its own folder; to "
        "use that one run: sparsetune doctor --repair"
    )


def use_own_artifacts(database: Path) -> None:
    """Let a moved or copied store read and write the artifacts beside it, in one transaction."""
    places, own = former_places(database), (database.parent / ARTIFACTS).as_uri()
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        for place in places:
            for table, column in _ADDRESSES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (own, len(place) + 1, len(place) + 1, f"{place}/"),
                )
