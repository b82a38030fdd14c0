"""Publishing to a stand-in for a server: another local store, reached by a client that can fail."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from sparsetune.config import Config, resolve
from sparsetune.tracking import Store, TrackingListener, connect, publish, publisher, resolve_store
from sparsetune.tracking.publish import ServerCopies, unpublished_runs
from sparsetune.tracking.publisher import Publisher
from sparsetune.tracking.run_logger import RunLogger, start_run
from sparsetune.tracking.store import KEY, PUBLISHED, SERVER, experiment_id, local_store
from tests.tracking.conftest import artifacts_of, runs_of, tracking
from tests.tracking.test_log_study import ended, make_trial, started

URI = "http://server"


class LateClient(MlflowClient):
    """A client whose first request for a run times out, although the server executes it later."""

    missed: tuple[Any, ...] | None = None

    def create_run(self, *request: Any) -> Run:
        if self.missed is None:
            self.missed = request
            raise ConnectionError("timed out")
        return super().create_run(*request)

    def catch_up(self) -> str:
        assert self.missed is not None
        return str(super().create_run(*self.missed).info.run_id)


@pytest.fixture
def local(client: MlflowClient, store: Store, experiment: str) -> RunLogger:
    """A finished run of the local store, to be published."""
    run = start_run(client, experiment_id(client, store, experiment), "a run", kind="trial", tags={SERVER: URI})
    run.log({"psnr": float("nan"), "score": 1}, params={"seed": 1}, tables={"rows.json": [{"run": run.run_id}]})
    run.finish()
    return run


@pytest.fixture
def server(migrated_database: Path, tmp_path: Path) -> LateClient:
    shutil.copy(migrated_database, tmp_path / "server.db")
    store = resolve_store(tracking(uri=f"sqlite:///{tmp_path}/server.db"), {})
    return LateClient(store.uri, store.registry_uri)


@pytest.fixture
def copies(client: MlflowClient, server: LateClient, monkeypatch: pytest.MonkeyPatch) -> ServerCopies:
    monkeypatch.setattr(publish, "check_answers", lambda uri: None)
    copies = ServerCopies(client, Store(URI, URI, None))
    copies._remote = server
    return copies


def test_a_run_that_a_slow_server_made_twice_is_there_once_in_the_end(
    copies: ServerCopies, local: RunLogger, server: LateClient, experiment: str
) -> None:
    with pytest.raises(publish.TrackingError, match="timed out"):
        copies.publish(local.run_id)
    assert copies.publish(local.run_id)
    twin = server.catch_up()
    local.client.set_tag(local.run_id, PUBLISHED, "no")
    assert copies.publish(local.run_id)
    (run,) = runs_of(server, experiment)
    assert run.info.run_id != twin and run.data.params == {"seed": "1"} and run.info.status == "FINISHED"
    assert run.data.tags[KEY] == local.run_id and SERVER not in run.data.tags
    assert json.loads(Path(server.download_artifacts(run.info.run_id, "rows.json")).read_text())["data"] == [
        [run.info.run_id]
    ]


def test_a_published_run_is_left_alone_until_it_changes(
    copies: ServerCopies, local: RunLogger, server: LateClient, client: MlflowClient, experiment: str
) -> None:
    server.missed = ()
    assert copies.publish(local.run_id) and not copies.publish(local.run_id)
    assert local.run_id not in {run.info.run_id for run in unpublished_runs(client, URI)}
    local.reopen()
    local.log({"score": 2}, step=1)
    assert copies.publish(local.run_id) and not copies.publish(local.run_id)
    (run,) = runs_of(server, experiment)
    assert run.info.status == "RUNNING"
    local.log_json({}, "late.json")
    assert copies.publish(local.run_id)
    local.finish()
    assert copies.publish(local.run_id)
    (run,) = runs_of(server, experiment)
    assert run.info.status == "FINISHED" and "late.json" in artifacts_of(server, run.info.run_id)
    assert [point.value for point in server.get_metric_history(run.info.run_id, "score")] == [1, 2]


def test_a_pass_sends_only_what_is_new(
    copies: ServerCopies, local: RunLogger, server: LateClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.missed = ()
    local.reopen()
    for step in range(1, 5):
        local.log({"score": float(step)}, step=step)
    assert copies.publish(local.run_id)
    local.log({"score": 5, "other": float("nan")}, step=5, tags={"late": "yes"})
    sent: list[dict[str, Any]] = []
    log_batch = server.log_batch

    def spy(run_id: str, **batch: Any) -> Any:
        sent.append(batch)
        return log_batch(run_id, **batch)

    monkeypatch.setattr(server, "log_batch", spy)
    assert copies.publish(local.run_id)
    (batch,) = sent
    points = {(point.key, point.step) for point in batch["metrics"]}
    assert {("score", 5), ("other", 5)} <= points and not points & {("score", 1), ("score", 2), ("psnr", 0)}
    assert [tag.key for tag in batch["tags"]] == ["late"] and not batch["params"]


def test_runs_of_two_hosts_with_one_key_are_one_on_the_server(
    copies: ServerCopies, local: RunLogger, server: LateClient, client: MlflowClient, store: Store, experiment: str
) -> None:
    server.missed = ()
    identifier = experiment_id(client, store, experiment)
    other = start_run(client, identifier, "a run", kind="tuning", tags={SERVER: URI, KEY: local.run_id})
    other.log(params={"seed": 2, "other": 3})
    assert copies.publish(local.run_id) and copies.publish(other.run_id)
    (run,) = runs_of(server, experiment)
    assert run.data.params == {"seed": "1", "other": "3"} and run.info.status == "FINISHED"


def test_an_artifact_that_cannot_be_read_fails_only_its_own_run(
    copies: ServerCopies, local: RunLogger, server: LateClient
) -> None:
    server.missed = ()
    folder = Path(local.client.download_artifacts(local.run_id, ""))
    (folder / "rows.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(publish.TrackingError, match=f"cannot publish run {local.run_id}: .*decode"):
        copies.publish(local.run_id)


class BehindAProxy(LateClient):
    """A client whose proxy refuses files above 1 kB, and answers an upload of `lost` with a login page."""

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        if Path(local_path).stat().st_size > 1000:
            raise MlflowException("API request failed with error code 413 != 200. Response body: 'too large'")
        if not Path(local_path).name.startswith("lost"):
            super().log_artifact(run_id, local_path, artifact_path)


@pytest.fixture
def proxied(copies: ServerCopies, server: LateClient) -> LateClient:
    behind = BehindAProxy(server.tracking_uri, server._registry_uri)
    behind.missed = ()
    copies._remote = behind
    return behind


def test_a_refused_upload_holds_back_neither_metrics_nor_status_nor_other_files(
    copies: ServerCopies, proxied: LateClient, local: RunLogger, experiment: str
) -> None:
    for name, size in (("a-report.html", 5000), ("b-video.mp4", 2000), ("z-result.json", 10)):
        local.client.log_text(local.run_id, "x" * size, name)
    with pytest.raises(publish.TrackingError, match="413"):
        copies.publish(local.run_id)
    (run,) = runs_of(proxied, experiment)
    assert (run.info.status, run.data.metrics["score"], run.data.params) == ("FINISHED", 1.0, {"seed": "1"})
    assert set(artifacts_of(proxied, run.info.run_id)) == {"rows.json", "z-result.json"}
    with pytest.raises(publish.TrackingError, match="413"):  # and is tried again
        copies.publish(local.run_id)


def test_an_upload_that_a_login_page_answered_is_found_missing(
    copies: ServerCopies, proxied: LateClient, local: RunLogger
) -> None:
    local.client.log_text(local.run_id, "x", "lost.txt")
    for _ in range(2):
        with pytest.raises(publish.TrackingError, match=r"the server lacks lost\.txt although the upload succeeded"):
            copies.publish(local.run_id)


def test_only_regular_files_of_the_runs_own_folder_are_uploaded(
    copies: ServerCopies, local: RunLogger, server: LateClient, experiment: str, tmp_path: Path
) -> None:
    server.missed = ()
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "passwd").write_text("root")
    folder = Path(local.client.download_artifacts(local.run_id, ""))
    (folder / "link.txt").symlink_to(tmp_path / "secrets" / "passwd")
    (folder / "links").symlink_to(tmp_path / "secrets")
    os.mkfifo(folder / "pipe")
    copies.publish(local.run_id)
    (run,) = runs_of(server, experiment)
    assert artifacts_of(server, run.info.run_id) == ["rows.json"]


def test_a_planted_artifact_folder_is_not_uploaded(
    copies: ServerCopies, local: RunLogger, server: LateClient, experiment: str, tmp_path: Path
) -> None:
    server.missed = ()
    (tmp_path / "passwd").write_text("root")
    run = local.client.get_run(local.run_id)
    planted = Run(run.info, run.data)
    planted.info._artifact_uri = tmp_path.as_uri()
    with pytest.raises(publish.TrackingError, match=r"outside .*; they are not uploaded"):
        copies._publish(planted)
    (copied,) = runs_of(server, experiment)
    assert artifacts_of(server, copied.info.run_id) == []


def test_a_bug_is_not_the_servers_failure(
    copies: ServerCopies, local: RunLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_run: Run) -> None:
        raise KeyError("sparsetune")

    monkeypatch.setattr(copies, "_publish", broken)
    with pytest.raises(KeyError, match="sparsetune"):
        copies.publish(local.run_id)


def test_a_bug_with_one_run_holds_up_no_other(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published: list[str] = []

    def publish_one(_copies: ServerCopies, run_id: str) -> bool:
        if run_id == "first":
            raise KeyError("sparsetune")
        published.append(run_id)
        return True

    monkeypatch.setattr(ServerCopies, "publish", publish_one)
    monkeypatch.setattr(publisher, "unpublished_runs", lambda *_: ())
    background = Publisher(client, Store(URI, URI, None))
    background.publish(["first", "second"])
    with caplog.at_level(logging.WARNING, "sparsetune"):
        background.flush()
    assert published == ["second"]
    assert caplog.messages == [
        f"1 run(s) are not on the tracking server {URI} yet (unexpected KeyError: 'sparsetune'); publish them with "
        f"`sparsetune sync --tracking-uri {URI}`"
    ]


@pytest.fixture
def hanging() -> Iterator[str]:
    """The URI of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


@pytest.fixture
def hung(hanging: str, experiment: str, tmp_path: Path, migrated_database: Path) -> Config:
    (tmp_path / "mlruns").mkdir()
    shutil.copy(migrated_database, tmp_path / "mlruns" / "mlflow.db")
    sets = {"root": str(tmp_path / "mlruns"), "experiment": experiment, "report": "no", "uri": hanging}
    return resolve(None, (), {}, {f"tracking.{name}": value for name, value in sets.items()})


def test_a_server_that_never_answers_slows_no_trial_and_ends_no_search(
    hung: Config, experiment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparsetune.tracking.listener.START_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING, "sparsetune"):
        listener = TrackingListener(hung)
        assert "does not answer: timed out" in caplog.messages[-1]
        listener.on_study_start(started(hung))
        began = time.perf_counter()
        for number in range(3):
            listener.on_trial(make_trial(number))
        assert time.perf_counter() - began < 3
        began = time.perf_counter()
        listener.on_study_end(ended(()))
        assert time.perf_counter() - began < 5
    assert listener.recorder.problem is None
    assert "4 run(s) are not on the tracking server" in caplog.messages[-1]
    assert "publish them with `sparsetune sync --tracking-uri " in caplog.messages[-1]
    runs = runs_of(connect(local_store(hung.tracking)), experiment)
    assert [run.info.status for run in runs] == ["FINISHED"] * 4


def test_a_process_whose_server_hangs_exits(hung: Config) -> None:
    program = (
        "import sys\nfrom sparsetune.config import resolve\n"
        "from sparsetune.tracking import TrackingListener, listener\n"
        "from tests.tracking.test_log_study import make_trial, started\n"
        "listener.START_SECONDS = 0.1\n"
        "config = resolve(None, (), {}, dict(pair.split('=', 1) for pair in sys.argv[1:]))\n"
        "tracking = TrackingListener(config)\ntracking.on_study_start(started(config))\n"
        "tracking.on_trial(make_trial(0))\nprint('at its end', flush=True)\n"
    )
    values = {name: getattr(hung.tracking, name) for name in ("root", "experiment", "uri")}
    command = [sys.executable, "-c", program, *(f"tracking.{name}={value}" for name, value in values.items())]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "at its end\n"
        assert process.wait(timeout=10) == 0
