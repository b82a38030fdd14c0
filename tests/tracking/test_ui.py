import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from mlflow import MlflowClient

from sparsetune.config import Config
from sparsetune.errors import TrackingError
from sparsetune.tracking import Store, TrackingListener, serve
from sparsetune.tracking import ui as ui_module
from sparsetune.tracking.ui import VIEW, experiment_page, page_of, running_ui
from tests.tracking.conftest import Evaluation


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_taken_port_is_said_before_anything_starts(store: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=rf"listen on 127\.0\.0\.1:{port}: .*choose another port"):
            serve(store.uri, port=port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 5000)])
def test_an_address_that_is_none_of_ours_is_an_error(store: Store, host: str, port: int) -> None:
    with pytest.raises(TrackingError, match="the UI cannot listen on"):
        serve(store.uri, host, port)


def test_a_tracking_server_has_only_its_link_told() -> None:
    printed: list[str] = []
    serve("http://runs.example:5000/", page=lambda uri: "#/experiments/1", say=printed.append)
    assert printed == ["the tracking server has its own UI: http://runs.example:5000/#/experiments/1"]


def test_a_ui_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, store: Store, port: int) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackingError, match="MLflow's UI is not installed, only its client; run: pip install mlflow"):
        serve(store.uri, port=port)


def test_a_ui_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, store: Store, port: int) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no such store')"]
    monkeypatch.setattr(ui_module, "_command", lambda *_: failing)
    with pytest.raises(TrackingError, match=r"does not answer at .* ended with status 1: no such store"):
        serve(store.uri, port=port)


@pytest.mark.slow
def test_the_ui_shows_the_runs_and_streams_videos(
    config: Config, client: MlflowClient, store: Store, evaluation: Evaluation, port: int
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_prompt(evaluation.prompts[0])
    with running_ui(store.uri, port=port) as (link, process):
        assert process.poll() is None
        with urllib.request.urlopen(link, timeout=10) as page:
            assert b"<title>MLflow</title>" in page.read()
        query = f"{link}get-artifact?path=videos/prompt_0_compare.mp4&run_id={listener.run_id}"
        with urllib.request.urlopen(query, timeout=10) as video:
            assert video.headers["Content-Type"] == "video/mp4"
            assert video.read() == b"prompt_0_compare.mp4"
        api = f"{link}api/2.0/mlflow/runs/get?run_id={listener.run_id}"
        with urllib.request.urlopen(api, timeout=10) as answer:
            assert json.load(answer)["run"]["info"]["run_name"] == "eval tuned"
    assert process.poll() is not None
    listener.on_failure(KeyboardInterrupt())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_serve_stops_the_ui(store: Store, port: int, number: int) -> None:
    program = f"from sparsetune.tracking import serve; serve({store.uri!r}, port={port})"
    with subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        assert f"http://127.0.0.1:{port}/" in served.stdout.readline()
        os.kill(served.pid, number)
        assert served.wait(timeout=30) == 0
    for _ in range(50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)
    pytest.fail("the UI still listens")


def test_the_page_is_the_newest_runs_experiment_with_the_view_on_it(
    config: Config, client: MlflowClient, experiment: str, evaluation: Evaluation
) -> None:
    client.create_experiment(f"{experiment}, newer, without runs")
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    listener.on_end(evaluation.end)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    unnamed = config.tracking.model_copy(update={"experiment": None})
    page = f"#/experiments/{found.experiment_id}/runs?viewStateShareKey=sparsetune&workflowType=machine_learning"
    assert experiment_page(client, unnamed) == experiment_page(client, config.tracking) == page
    written = client.get_experiment(found.experiment_id).tags["mlflow.sharedViewState.sparsetune"]
    assert json.loads(written) == VIEW


def test_an_experiment_that_does_not_exist_has_no_page(config: Config, client: MlflowClient) -> None:
    assert experiment_page(client, config.tracking) == ""


def test_a_store_that_cannot_be_read_has_no_page(config: Config) -> None:
    assert page_of("http://127.0.0.1:9", config.tracking) == ""


def test_a_view_that_must_not_be_written_leaves_the_plain_page(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    made = client.create_experiment(experiment)
    client.delete_experiment(made)  # MLflow refuses to write on it, as it does without permission
    assert experiment_page(client, config.tracking) == f"#/experiments/{made}/runs"
