"""Fixtures for all tests: no network, no user settings, no user folders."""

import os
import shutil
import signal
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sparsetune.metrics import registry

if TYPE_CHECKING:
    from tests.tracking.recorded import Place, World

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells make background jobs ignore SIGINT, which child processes inherit: the tests of Ctrl-C would hang.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide the developer's own settings, and keep the dense baselines of a session in a temporary folder."""
    for variable in list(os.environ):
        if variable.startswith("SPARSETUNE_") or variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            monkeypatch.delenv(variable)
    for variable in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SPARSETUNE_CACHE__DIR", str(tmp_path_factory.getbasetemp() / "baselines"))
    monkeypatch.setenv("SPARSETUNE_TRACKING__REPORT", "false")  # takes seconds per run; only its own tests need it


@pytest.fixture(autouse=True)
def isolated_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the metrics that a test registers."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the metadata of sparsetune's distribution, as in a source checkout that was never installed."""
    installed = metadata.Distribution.from_name

    def from_name(name: str) -> metadata.Distribution:
        if name == "sparsetune":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", from_name)


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store of MLflow's: making its tables takes seconds, copying the file does not."""
    from sqlalchemy import Engine, event

    from sparsetune.config import TrackingConfig
    from sparsetune.tracking import connect, resolve_store

    def in_a_hurry(connection: object, _record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")  # a test's store needs no durability

    event.listen(Engine, "connect", in_a_hurry)
    root = tmp_path_factory.mktemp("template")
    connect(resolve_store(TrackingConfig(root=root), {}))
    return root / "mlflow.db"


@pytest.fixture
def own_store(migrated_database: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default store, mlruns/mlflow.db in an empty current folder, for one test; returns the database."""
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    # Downloaded checkpoints are stored beside the baselines.
    monkeypatch.setenv("SPARSETUNE_CACHE__DIR", str(working_folder / "cache"))
    database = working_folder / "mlruns" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(migrated_database, database)
    return database


@pytest.fixture(scope="session")
def world(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> "World":
    """Recorded runs, one of them promoted, in a store that tests copy: see `World`."""
    from tests.tracking.recorded import make_world

    return make_world(migrated_database, tmp_path_factory.mktemp("world"))


@pytest.fixture
def shared_place(world: "World", working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Place":
    """The recorded runs in their store, for read-only tests: MLflow opens a store once per process."""
    from tests.tracking.recorded import Place

    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{world.database}")
    monkeypatch.setenv("SPARSETUNE_CACHE__DIR", str(working_folder / "cache"))
    return Place(world.database, working_folder)


@pytest.fixture
def place(world: "World", own_store: Path) -> "Place":
    """The recorded runs in a copy of the store; artifacts are shared, so tests record reviews on new runs only."""
    from tests.tracking.recorded import Place

    shutil.copy(world.database, own_store)
    return Place(own_store, own_store.parent.parent)
