import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from sparsetune.cli.main import main
from sparsetune.tracking import connect, resolve_store
from sparsetune.tracking.run_logger import start_run
from sparsetune.tracking.store import SERVER, experiment_id
from tests.tracking.conftest import tracking
from tests.tracking.servers import free_port


@pytest.fixture
def client(own_store: Path) -> MlflowClient:
    return connect(resolve_store(tracking(), {}))


def record(client: MlflowClient, server: str | None) -> None:
    experiment = experiment_id(client, resolve_store(tracking(), {}), "sparsetune/demo")
    start_run(client, experiment, "a run", kind="evaluation", tags={SERVER: server}).finish()


def test_without_a_store_there_is_nothing_to_publish(working_folder: Path) -> None:
    result = CliRunner().invoke(main, ["sync"])
    assert (result.exit_code, result.stdout) == (0, "all runs are published\n")
    assert CliRunner().invoke(main, ["sync", "--json"]).stdout == "[]\n"
    assert not list(working_folder.iterdir())


def test_a_run_recorded_without_a_server_is_not_published(client: MlflowClient) -> None:
    record(client, None)
    assert CliRunner().invoke(main, ["sync", "--tracking-uri", "http://127.0.0.1:9"]).exit_code == 0


def test_runs_go_to_the_configured_server_only(client: MlflowClient) -> None:
    servers = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    for server in (*servers, servers[0]):
        record(client, server)
    result = CliRunner().invoke(main, ["sync", "--json", "--tracking-uri", servers[0]])
    assert result.exit_code == 1
    rows = {row["server"]: row for row in json.loads(result.stdout)}
    assert {server: (row["sent"], row["left"]) for server, row in rows.items()} == {
        servers[0]: (0, 2),
        servers[1]: (0, 1),
    }
    assert rows[servers[0]]["reason"].startswith(f"the tracking server {servers[0]} does not answer")
    assert rows[servers[1]]["reason"] == "not the configured server; give it with --tracking-uri"
    assert "3 runs could not be published: " in result.stderr
    assert "run `sparsetune sync` again" in result.stderr
    assert f"{servers[0]}: 0 runs published, 2 left (not the configured" in CliRunner().invoke(main, ["sync"]).stdout


def test_a_damaged_store_is_an_error_of_one_line(own_store: Path) -> None:
    own_store.write_text("no database" * 100)
    result = CliRunner().invoke(main, ["sync"])
    assert result.exit_code == 1
    assert "file is not a database" in result.stderr and result.stderr.count("\n") == 1
