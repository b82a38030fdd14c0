"""Promotion, review, loading and rollback through a real tracking server, artifacts through its proxy."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner

import sparsetune
from sparsetune.cli.main import main
from sparsetune.tracking import flavor
from tests.tracking.recorded import Place, policy_of
from tests.tracking.servers import MlflowServer

pytestmark = pytest.mark.slow  # a server takes some 10 s to start


@pytest.fixture(scope="module")
def server(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_database, folder / "server.db")
    server = MlflowServer(f"sqlite:///{folder}/server.db", folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def remote(server: MlflowServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("SPARSETUNE_CACHE__DIR", str(working_folder / "cache"))
    return Place(server.uri, working_folder)


def run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == status, result.output
    return result.stdout


def test_run_is_reviewed_promoted_loaded_and_rolled_back_through_a_server(remote: Place) -> None:
    first, second = remote.tuned(0.9, sparsity=0.25), remote.tuned(0.8, sparsity=0.3)
    assert "NOT MET  human review" in run("promote", first.tuning, status=3)
    for recorded, version in ((first, "1"), (second, "2")):
        run("review", recorded.tuning[:10], "--ok", "--reviewer", "Ada")
        assert f"models:/demo-sparse@champion is version {version}" in run("promote", recorded.tuning)
    assert sparsetune.load_checkpoint("models:/demo-sparse@champion").policy == policy_of(0.8)
    assert sparsetune.load_checkpoint("models:/demo-sparse@previous").policy == policy_of(0.9)
    assert sparsetune.load_checkpoint(f"runs:/{second.tuning}/policy").policy == policy_of(0.8)
    served = mlflow.pyfunc.load_model("models:/demo-sparse@champion")
    assert served.metadata.flavors["sparsetune"]["base_source"] == "demo"
    assert flavor.load_model("models:/demo-sparse@champion").policy == policy_of(0.8)
    rows = {row["run_id"]: row for row in json.loads(run("runs", "--json"))}
    assert rows[second.tuning]["aliases"] == ["demo-sparse@champion"] and rows[first.tuning]["review"] == "ok"
    change = json.loads(run("compare", "models:/demo-sparse@previous", second.tuning, "--json"))["changes"]["sparsity"]
    assert change["difference"]["mean"] == pytest.approx(0.05)
    assert run("rollback") == "models:/demo-sparse@champion is version 1, was version 2\n"
    assert sparsetune.load_checkpoint("models:/demo-sparse@champion").policy == policy_of(0.9)
    assert not [tag for tag in remote.registry().model().tags if tag.startswith("sparsetune.claim.")]  # type: ignore[union-attr]
    output = run("promote", second.tuning, "--alias", "staging", "--json")
    assert json.loads(output)["promoted"] == {"version": "2", "replaced": None, "uri": "models:/demo-sparse@staging"}


def test_server_s_refusals_are_one_line_and_nothing_is_registered(remote: Place) -> None:
    recorded = remote.tuned(0.9)
    run("review", recorded.tuning, "--ok", "--reviewer", "Ada")
    for args, status, message in (
        (("--name", "a/b"), 2, "-_.()+, got 'a/b'; choose another"),
        (
            ("--alias", "no spaces", "--name", "refused"),
            2,
            "MLflow rejects --alias 'no spaces'",
        ),
        (("--alias", "v1", "--name", "refused"), 2, "--alias must not look like a version number, got v1"),
    ):
        result = CliRunner().invoke(main, ["promote", recorded.tuning, *args])
        assert result.exit_code == status, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert remote.registry("refused").model() is None
