"""Making a SQLite store, and refusing databases of other tools."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event

from sparsetune.errors import TrackingError, TuningError
from sparsetune.tracking import connect, database, resolve_store
from sparsetune.tracking.database import prepare_database
from sparsetune.tracking.store import experiment_id
from sparsetune.tuning.search.study import open_study, quiet
from sparsetune.urls import sqlite_url
from tests.tracking.conftest import tracking


@pytest.fixture
def quick(migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Copy a database instead of making one; yields the paths that were made."""
    made: list[Path] = []

    def copy(path: Path) -> None:
        made.append(path)
        shutil.copy(migrated_database, path)

    monkeypatch.setattr(database, "_make", copy)
    monkeypatch.setattr(database, "_QUIET_SECONDS", 0.0)
    yield made


def half_made(path: Path, tables: int = 4) -> Path:
    """A database as a process leaves it that is killed while MLflow creates its first tables."""
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = sqlalchemy.create_engine(sqlite_url(path))
    for table in list(Base.metadata.sorted_tables)[:tables]:
        table.create(engine)
    engine.dispose()
    return path


@pytest.mark.parametrize("tables", [1, 4])
def test_a_half_made_database_is_made_anew(tmp_path: Path, quick: list[Path], tables: int) -> None:
    path = half_made(tmp_path / "mlflow.db", tables)
    client = connect(resolve_store(tracking(root=tmp_path), {}))
    assert [one.name for one in client.search_experiments()] == ["Default"]
    assert quick == [path]
    prepare_database(sqlite_url(path))
    assert quick == [path]


def test_an_empty_file_is_a_database_yet_to_be_made(tmp_path: Path, quick: list[Path]) -> None:
    (tmp_path / "mlflow.db").touch()
    prepare_database(sqlite_url(tmp_path / "mlflow.db"))
    assert quick == [tmp_path / "mlflow.db"]


def test_a_database_with_anything_in_it_is_never_made_anew(tmp_path: Path, quick: list[Path]) -> None:
    path = half_made(tmp_path / "mlflow.db")
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO experiments (experiment_id, name) VALUES (0, 'mine')")
    prepare_database(sqlite_url(path))
    assert quick == []


def test_tables_of_another_tool_are_never_made_anew(tmp_path: Path, quick: list[Path]) -> None:
    path = half_made(tmp_path / "mlflow.db")
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    prepare_database(sqlite_url(path))
    assert quick == []


class _KilledAt:
    """Raises KeyboardInterrupt at a statement, as Ctrl-C would."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("statement", [1, 5, 20, 60])
def test_ctrl_c_while_a_database_is_made_leaves_none(tmp_path: Path, statement: int) -> None:
    interrupt = _KilledAt(statement)
    event.listen(sqlalchemy.Engine, "before_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare_database(sqlite_url(tmp_path / "mlflow.db"))
    finally:
        event.remove(sqlalchemy.Engine, "before_cursor_execute", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".mlflow-0123abcd.db", ".mlflow-0123abcd.db-journal", ".mlflow-notes.db", "mlflow-0123abcd.db"):
        (tmp_path / name).touch()
    interrupt = _KilledAt(1)
    event.listen(sqlalchemy.Engine, "before_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare_database(sqlite_url(tmp_path / "mlflow.db"))
    finally:
        event.remove(sqlalchemy.Engine, "before_cursor_execute", interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {".mlflow-notes.db", "mlflow-0123abcd.db"}


@pytest.mark.slow
def test_a_store_survives_kills_at_any_moment_of_its_creation(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom sparsetune.config import TrackingConfig\nfrom sparsetune.tracking import *\n"
        "import mlflow.store.tracking.sqlalchemy_store\nprint('ready', flush=True)\n"
        "print(len(connect(resolve_store(TrackingConfig(root=sys.argv[1]), {})).search_experiments()), flush=True)"
    )
    for seconds in (0.3, 1.5):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "ready\n1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_optunas_database_is_refused_as_a_tracking_store(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "optuna.db")
    with quiet():
        open_study(url, "a", {}, seed=0, n_trials=1)
    before = (tmp_path / "optuna.db").read_bytes()
    with pytest.raises(TrackingError, match=r"optuna\.db is another tool's database.*with tracking\.uri"):
        connect(resolve_store(tracking(uri=url), {}))
    assert (tmp_path / "optuna.db").read_bytes() == before


@pytest.mark.parametrize("half", [False, True])
def test_mlflows_database_is_refused_as_a_studys_storage(tmp_path: Path, migrated_database: Path, half: bool) -> None:
    path = half_made(tmp_path / "mlflow.db") if half else Path(shutil.copy(migrated_database, tmp_path / "mlflow.db"))
    before = path.read_bytes()
    with (
        pytest.raises(TuningError, match=r"mlflow\.db is another tool's database.*one of its own, e\.g\. sqlite"),
        quiet(),
    ):
        open_study(sqlite_url(path), "a", {}, seed=0, n_trials=1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["what?", "50%20off", "c#", "a b", 'it\'s "x"', "é中文"])
def test_runs_artifacts_and_studies_are_kept_in_a_folder_of_any_name(
    tmp_path: Path, migrated_database: Path, name: str
) -> None:
    root = tmp_path / name
    root.mkdir()
    shutil.copy(migrated_database, root / "mlflow.db")
    store = resolve_store(tracking(root=root), {})
    client = connect(store)
    run = client.create_run(experiment_id(client, store, "sparsetune/demo")).info.run_id
    client.log_text(run, "hello", "notes/a.txt")
    assert Path(client.download_artifacts(run, "notes/a.txt")).read_text() == "hello"
    assert [path.read_text() for path in (root / "artifacts").rglob("a.txt")] == ["hello"]
    with quiet():
        open_study(sqlite_url(root / "optuna.db"), "a", {}, seed=0, n_trials=1)
    assert all(path.is_relative_to(root) for path in tmp_path.rglob("*") if path.is_file())
    assert {"mlflow.db", "optuna.db", "artifacts"} == {path.name for path in root.iterdir()}
