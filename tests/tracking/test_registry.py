"""A model registry separate from the tracking store, as set by MLFLOW_REGISTRY_URI."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from sparsetune.checkpoint import load_checkpoint
from sparsetune.cli.main import main
from sparsetune.config import TrackingConfig
from sparsetune.errors import TrackingError
from sparsetune.tracking import connect, resolve_store
from sparsetune.tracking.lookup import resolve_checkpoint
from sparsetune.tracking.promotion import Move, judge, promote, rollback
from sparsetune.tracking.results import find_candidate, list_runs, result_of
from tests.tracking.recorded import Place, Recorded, policy_of
from tests.tracking.servers import MlflowServer, free_port


def run(*args: str) -> str:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == 0, result.output
    return result.stdout


def reviewed(place: Place, cdfthreshd: float, sparsity: float) -> Recorded:
    return place.reviewed(place.tuned(cdfthreshd, sparsity=sparsity))


def promoted(place: Place, recorded: Recorded) -> Move:
    return promote(place.registry(), judge(place.registry(), find_candidate(place.client, recorded.tuning)))


def check_whole_life(place: Place, runs_uri: str, registry_uri: str) -> None:
    """Promote two, load, list, compare and roll back; everything is in the right store."""
    first, second = reviewed(place, 0.9, 0.25), reviewed(place, 0.8, 0.3)
    assert promoted(place, first).version == "1"
    assert promoted(place, second) == Move("demo-sparse", "champion", "2", "1")
    assert promoted(place, second).version == "2"  # created once, however often it is promoted
    assert load_checkpoint(resolve_checkpoint("models:/demo-sparse@champion")).policy == policy_of(0.8)
    assert load_checkpoint(resolve_checkpoint("models:/demo-sparse/1")).policy == policy_of(0.9)
    assert load_checkpoint(resolve_checkpoint(second.tuning)).policy == policy_of(0.8)
    aliases = {row.run_id: row.aliases for row in list_runs(place.store)}
    assert aliases == {second.tuning: ("demo-sparse@champion",), first.tuning: ("demo-sparse@previous",)}
    assert result_of(place.client, "models:/demo-sparse@champion") == second.result
    assert rollback(place.registry()).version == "1"
    assert load_checkpoint(resolve_checkpoint("models:/demo-sparse@champion")).policy == policy_of(0.9)
    assert MlflowClient(runs_uri, runs_uri).search_registered_models() == []
    registered = MlflowClient(registry_uri, registry_uri)
    assert {name: str(number) for name, number in registered.get_registered_model("demo-sparse").aliases.items()} == {
        "champion": "1", "previous": "2",
    }  # fmt: skip


@pytest.fixture
def registry(migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A separate SQLite registry for the test."""
    shutil.copy(migrated_database, tmp_path / "registry.db")
    return f"sqlite:///{tmp_path}/registry.db"


@pytest.mark.slow
def test_two_databases(own_store: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    check_whole_life(Place(own_store, own_store.parent.parent, registry), f"sqlite:///{own_store}", registry)
    assert os.environ["MLFLOW_REGISTRY_URI"] == registry
    listed = json.loads(run("runs", "--json"))
    assert sorted(row["aliases"] for row in listed) == [["demo-sparse@champion"], ["demo-sparse@previous"]]
    assert "@champion is version 2, was version 1" in run("rollback")
    shown = json.loads(run("checkpoint", "show", "models:/demo-sparse@champion", "--json"))
    assert shown["policy"]["keep_text"] is True


def test_a_relative_registry_is_made_absolute_and_its_folder_made(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = resolve_store(TrackingConfig(), {"MLFLOW_REGISTRY_URI": "sqlite:///registered/models.db"})
    assert store.registry_uri == f"sqlite:///{own_store.parent.parent.as_posix()}/registered/models.db"
    assert store.registry_is_apart and not store.copies_models
    assert not resolve_store(TrackingConfig(), {}).registry_is_apart


def test_a_registry_server_that_is_away_is_said_at_once(own_store: Path) -> None:
    store = resolve_store(TrackingConfig(), {"MLFLOW_REGISTRY_URI": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(
        TrackingError, match=r"the registry server http://.* does not answer.*correct MLFLOW_REGISTRY_URI"
    ):
        connect(store)


@pytest.fixture
def server(migrated_database: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(migrated_database, folder / "mlflow.db")
    server = MlflowServer(f"sqlite:///{folder}/mlflow.db", folder)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_runs_in_a_database_and_the_registry_at_a_server(
    own_store: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", server.uri)
    check_whole_life(Place(own_store, own_store.parent.parent, server.uri), f"sqlite:///{own_store}", server.uri)
    shutil.rmtree(own_store.parent.parent / "artifacts")  # serving needs only the registry
    assert load_checkpoint(resolve_checkpoint("models:/demo-sparse/2")).policy == policy_of(0.8)


@pytest.mark.slow
def test_runs_at_a_server_and_the_registry_in_a_database(
    working_folder: Path, server: MlflowServer, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    monkeypatch.setenv("SPARSETUNE_CACHE__DIR", str(working_folder / "cache"))
    check_whole_life(Place(server.uri, working_folder, registry), server.uri, registry)
