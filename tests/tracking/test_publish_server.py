"""Publishing to a real tracking server that is killed, hangs, and comes back."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from sparsetune.attention.policy import Policy
from sparsetune.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from sparsetune.config import Config, resolve
from sparsetune.errors import TrackingError
from sparsetune.tracking import TrackingListener, connect, publisher
from sparsetune.tracking.publish import unpublished_runs
from sparsetune.tracking.store import PUBLISHED, local_store
from tests.tracking.conftest import LAYERS, artifacts_of, make_evaluation, make_result, runs_of
from tests.tracking.servers import MlflowServer, postgres, postgres_binaries
from tests.tracking.test_log_study import ended, make_trial, started

pytestmark = pytest.mark.slow

POLICY = Policy.uniform([(name, 3) for name in LAYERS])


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PostgreSQL, as servers have it; SQLite on a machine without."""
    binaries = postgres_binaries()
    if binaries is None:
        assert not os.environ.get("CI"), "CI must have PostgreSQL"
        yield f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"
        return
    with postgres(binaries) as uri:
        yield uri


@pytest.fixture(scope="module")
def machine(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(database, tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(machine: MlflowServer) -> Iterator[MlflowServer]:
    """The server, running before and after each test."""
    yield machine
    if machine._process is None:
        machine.start()


@pytest.fixture
def remote(server: MlflowServer, experiment: str, tmp_path: Path, migrated_database: Path) -> Config:
    (tmp_path / "mlruns").mkdir()
    shutil.copy(migrated_database, tmp_path / "mlruns" / "mlflow.db")
    settings = {"tracking.root": str(tmp_path / "mlruns"), "tracking.experiment": experiment, "tracking.report": "no"}
    return resolve(None, (), {}, settings | {"tracking.uri": server.uri})


@pytest.fixture
def reader(server: MlflowServer) -> MlflowClient:
    return MlflowClient(server.uri)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "RETRY_SECONDS", 0.2)


def unpublished(config: Config) -> list[str]:
    """Names of the local runs that are missing or incomplete on the server."""
    return [str(run.info.run_name) for run in unpublished_runs(connect(local_store(config.tracking)))]


def sync(config: Config) -> "subprocess.Popen[str]":
    sets = [f"--set=tracking.root={config.tracking.root}", f"--set=tracking.uri={config.tracking.uri}"]
    command = [sys.executable, "-m", "sparsetune", "sync", "--json", *sets]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: "subprocess.Popen[str]") -> tuple[int, Any, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, json.loads(out) if out else None, error


def publish_again(config: Config) -> None:
    """Publish every run as if it were not known to be on the server."""
    client = connect(local_store(config.tracking))
    experiment = client.get_experiment_by_name(str(config.tracking.experiment))
    assert experiment is not None
    for run in client.search_runs([experiment.experiment_id]):
        client.delete_tag(run.info.run_id, PUBLISHED)
    assert finished(sync(config))[0] == 0


def snapshot(client: MlflowClient, experiment: str) -> dict[str, Any]:
    """All of an experiment's runs on a server, with their ids."""
    return {run.info.run_id: (run.to_dictionary(), _history(client, run)) for run in runs_of(client, experiment)}


def published(client: MlflowClient, experiment: str, num_runs: int) -> list[Run]:
    """Wait until a server has this many runs of an experiment, with tags."""
    for _ in range(600):
        if client.get_experiment_by_name(experiment) is not None:
            runs = runs_of(client, experiment)
            if len(runs) == num_runs and all("sparsetune.kind" in run.data.tags for run in runs):
                return runs
        time.sleep(0.05)
    raise TimeoutError(f"{experiment} has no {num_runs} runs")


def _history(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float, int]]]:
    points = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: sorted((p.step, p.value, p.timestamp) for p in found) for name, found in points.items()}


def test_a_tuning_whose_server_is_killed_and_comes_back_is_recorded_whole(
    server: MlflowServer,
    remote: Config,
    reader: MlflowClient,
    experiment: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = save_checkpoint(Checkpoint(POLICY, Manifest(tuner="optuna")), tmp_path / "tuned")
    trials = tuple(make_trial(number) for number in range(4))
    judged = make_evaluation(tmp_path / "results")
    listener = TrackingListener(remote)
    listener.on_study_start(started(remote))
    listener.on_trial(trials[0])
    server.kill()
    listener.on_trial(trials[1])
    listener.on_trial(trials[2])
    server.start()
    listener.on_trial(trials[3])
    published(reader, experiment, 5)
    monkeypatch.setattr(publisher, "RETRY_SECONDS", 3600.0)  # `sync` uploads the rest
    server.kill()
    listener.on_start(judged.start)
    for prompt in judged.prompts:
        listener.on_prompt(prompt)
    listener.on_end(judged.end)
    shutil.rmtree(tmp_path / "results")  # publishing needs only the local store
    with caplog.at_level(logging.WARNING, "sparsetune"):
        listener.on_study_end(ended(trials, trials[0], checkpoint_path=checkpoint, evaluation=make_result()))
    assert listener.recorder.problem is None
    assert "publish them with `sparsetune sync --tracking-uri" in caplog.messages[-1]

    status, _, error = finished(sync(remote))
    assert status == 1 and "could not be published: the tracking server" in error
    server.start()
    status, report, _ = finished(sync(remote))
    assert status == 0 and [(result["sent"], result["left"]) for result in report] == [(3, 0)]
    assert unpublished(remote) == []
    before = snapshot(reader, experiment)
    assert finished(sync(remote))[:2] == (0, [])
    publish_again(remote)
    assert snapshot(reader, experiment) == before

    runs = {str(run.info.run_name): run for run in runs_of(reader, experiment)}
    assert sorted(runs) == ["eval tuned", *(f"trial {number}" for number in range(4)), "tune demo's study"]
    assert len(runs_of(reader, experiment)) == len(runs)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs.pop("tune demo's study")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert parent.data.tags["best.run_id"] == runs["trial 0"].info.run_id
    table = json.loads(Path(reader.download_artifacts(parent.info.run_id, "trials.json")).read_text())
    assert [row[1] for row in table["data"]] == [runs[f"trial {number}"].info.run_id for number in range(4)]
    assert f"/runs/{runs['trial 2'].info.run_id})" in parent.data.tags["mlflow.note.content"]
    for number in range(4):
        points = reader.get_metric_history(runs[f"trial {number}"].info.run_id, "prompt/psnr")
        assert sorted((point.step, point.value) for point in points) == [(1, 36.0), (2, 40.0)]
    evaluation = runs["eval tuned"].info.run_id
    assert artifacts_of(reader, evaluation, "videos") == ["videos/prompt_0_compare.mp4", "videos/prompt_1_compare.mp4"]
    video = reader.download_artifacts(evaluation, "videos/prompt_1_compare.mp4", str(tmp_path))
    assert Path(video).read_bytes() == b"prompt_1_compare.mp4"
    loaded = load_checkpoint(reader.download_artifacts(parent.info.run_id, "checkpoint", str(tmp_path)))
    assert loaded.policy == POLICY
    (output,) = reader.get_run(parent.info.run_id).outputs.model_outputs
    assert str(reader.get_logged_model(output.model_id).status) == "READY"


def test_a_server_that_comes_back_is_sent_what_waited_without_being_told(
    server: MlflowServer, remote: Config, reader: MlflowClient, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = TrackingListener(remote)
    listener.on_study_start(started(remote))
    server.kill()
    with caplog.at_level(logging.WARNING, "sparsetune"):
        for number in range(2):
            listener.on_trial(make_trial(number))
            time.sleep(1)
        server.start()
        time.sleep(2)
        listener.on_trial(make_trial(2))
        listener.on_study_end(ended(()))
    away, back = [record.getMessage() for record in caplog.records if record.name.startswith("sparsetune")]
    assert "does not answer" in away and "kept in the local store meanwhile" in away
    assert "answers again" in back
    assert unpublished(remote) == []
    assert [run.info.status for run in runs_of(reader, experiment)] == ["FINISHED"] * 4


def test_a_server_that_hangs_holds_no_trial_up(
    server: MlflowServer, remote: Config, reader: MlflowClient, experiment: str
) -> None:
    listener = TrackingListener(remote)
    listener.on_study_start(started(remote))
    server.pause()
    began = time.perf_counter()
    for number in range(3):
        listener.on_trial(make_trial(number))
    took = time.perf_counter() - began
    server.resume()
    listener.on_study_end(ended(()))
    assert took < 2
    assert unpublished(remote) == []
    assert [run.info.status for run in runs_of(reader, experiment)] == ["FINISHED"] * 4


def test_what_a_killed_process_left_is_sent_by_the_next_one(
    server: MlflowServer, remote: Config, reader: MlflowClient, experiment: str
) -> None:
    program = (
        "import os, signal, sys\n"
        "from sparsetune.config import resolve\nfrom sparsetune.tracking import TrackingListener\n"
        "from tests.tracking.test_log_study import make_trial, started\n"
        "config = resolve(None, (), {}, dict(pair.split('=', 1) for pair in sys.argv[2:]))\n"
        "listener = TrackingListener(config)\nlistener.on_study_start(started(config))\n"
        "os.killpg(int(sys.argv[1]), signal.SIGKILL)\nlistener.on_trial(make_trial(0))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    tracking = {name: getattr(remote.tracking, name) for name in ("root", "experiment", "uri")}
    pairs = [f"tracking.{name}={value}" for name, value in tracking.items()]
    assert server._process is not None
    command = [sys.executable, "-c", program, str(server._process.pid), *pairs]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    server.kill()
    assert "trial 0" in unpublished(remote)
    server.start()
    listener = TrackingListener(remote)
    listener.on_study_start(started(remote, num_done=1))
    listener.on_study_end(ended((make_trial(0),), make_trial(0)))
    parent, trial = runs_of(reader, experiment)[::-1]
    if parent.info.run_name == "trial 0":
        parent, trial = trial, parent
    assert parent.data.tags["best.run_id"] == trial.info.run_id
    assert (parent.info.status, trial.info.status) == ("FINISHED", "FINISHED")
    assert unpublished(remote) == []


def test_a_process_killed_while_it_publishes_and_a_sync_leave_each_run_once(
    server: MlflowServer, remote: Config, reader: MlflowClient, experiment: str
) -> None:
    program = (
        "import os, signal, sys\n"
        "from sparsetune.config import resolve\nfrom sparsetune.tracking import TrackingListener\n"
        "from tests.tracking.test_log_study import make_trial, started\n"
        "config = resolve(None, (), {}, dict(pair.split('=', 1) for pair in sys.argv[1:]))\n"
        "listener = TrackingListener(config)\nlistener.on_study_start(started(config))\n"
        "for number in range(6):\n    listener.on_trial(make_trial(number))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    tracking = {name: getattr(remote.tracking, name) for name in ("root", "experiment", "uri")}
    command = [sys.executable, "-c", program, *(f"tracking.{name}={value}" for name, value in tracking.items())]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert unpublished(remote)
    assert finished(sync(remote))[0] == 0
    assert unpublished(remote) == []
    runs = {str(run.info.run_name): run for run in runs_of(reader, experiment)}
    assert sorted(runs) == [*(f"trial {number}" for number in range(6)), "tune demo's study"]
    assert len(runs_of(reader, experiment)) == len(runs)
    for number in range(6):
        points = _history(reader, runs[f"trial {number}"])["prompt/psnr"]
        assert [(step, value) for step, value, _ in points] == [(1, 36.0), (2, 40.0)]


def test_a_sync_that_is_killed_and_two_at_once_send_everything_once(
    server: MlflowServer, remote: Config, reader: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = TrackingListener(remote)
    listener.on_study_start(started(remote))
    monkeypatch.setattr(publisher, "RETRY_SECONDS", 3600.0)  # `sync` uploads everything
    server.kill()
    for number in range(15):
        listener.on_trial(make_trial(number))
    listener.on_study_end(ended(()))
    server.start()
    waiting = len(unpublished(remote))
    killed = sync(remote)
    while len(unpublished(remote)) == waiting and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    left = len(unpublished(remote))
    assert 0 < left < waiting
    reports = [finished(process) for process in (sync(remote), sync(remote))]
    assert sum(result["sent"] for _, report, _ in reports for result in report) == left
    assert unpublished(remote) == []
    assert len(runs_of(reader, experiment)) == 16
    for run in runs_of(reader, experiment):
        for name, points in _history(reader, run).items():
            assert len(points) == len(set(points)), name


def test_a_run_that_was_deleted_meanwhile_holds_no_other_up(
    server: MlflowServer, remote: Config, reader: MlflowClient, experiment: str
) -> None:
    listener = TrackingListener(remote)
    listener.on_study_start(started(remote))
    (study,) = published(reader, experiment, 1)
    reader.delete_run(study.info.run_id)
    listener.on_trial(make_trial(0))
    listener.on_study_end(ended(()))
    (trial,) = runs_of(reader, experiment)
    assert (trial.info.run_name, trial.info.status) == ("trial 0", "FINISHED")
    status, report, error = finished(sync(remote))
    assert status == 1 and report[0]["left"] == 1
    assert "was deleted on the server" in error and "was deleted on the server" in report[0]["reason"]
    reader.restore_run(study.info.run_id)
    assert finished(sync(remote))[0] == 0
    assert {run.info.status for run in runs_of(reader, experiment)} == {"FINISHED"}


def test_a_server_that_is_down_before_the_first_run_is_an_error_at_once(server: MlflowServer, remote: Config) -> None:
    server.kill()
    with pytest.raises(TrackingError, match=r"tracking server .* does not answer"):
        TrackingListener(remote)
