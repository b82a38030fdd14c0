import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sparsetune.config import Config
from sparsetune.locks import exclusive
from sparsetune.tracking import TrackingListener
from sparsetune.tracking.processes import PROCESS, end_left_runs, num_dead_processes
from tests.tracking.conftest import Evaluation, runs_of


@pytest.fixture
def lock(root: Path) -> Path:
    return root / f".process-7-{uuid.uuid4().hex}.lock"


@pytest.fixture
def left(lock: Path, client: MlflowClient, experiment: str) -> str:
    """A run that a killed process left open: its lock file is there, and nobody holds it."""
    made = client.create_experiment(experiment)
    lock.touch()
    process = lock.name.removeprefix(".process-").removesuffix(".lock")
    return str(client.create_run(made, tags={PROCESS: process}).info.run_id)


def test_the_next_run_ends_what_a_killed_process_left_open(
    config: Config, client: MlflowClient, root: Path, lock: Path, left: str, evaluation: Evaluation
) -> None:
    listener = TrackingListener(config)
    listener.on_start(evaluation.start)
    run = client.get_run(left)
    assert (run.info.status, run.data.tags["error"]) == ("KILLED", "its process died before it ended the run")
    assert client.get_run(listener.run_id or "").info.status == "RUNNING"
    assert not lock.exists()
    assert end_left_runs(client, root) == 0
    assert client.get_run(listener.run_id or "").info.status == "RUNNING"
    listener.on_end(evaluation.end)


def test_a_run_of_a_living_process_stays_open(client: MlflowClient, root: Path, lock: Path, left: str) -> None:
    with exclusive(lock, what="a test"):
        assert num_dead_processes(root) == 0
        assert end_left_runs(client, root) == 0
    assert client.get_run(left).info.status == "RUNNING"


def test_counting_dead_processes_leaves_their_runs_to_be_ended(client: MlflowClient, root: Path, left: str) -> None:
    assert num_dead_processes(root) == 1
    assert end_left_runs(client, root) == 1
    assert num_dead_processes(root) == 0


def test_a_run_that_ended_keeps_its_status(client: MlflowClient, root: Path, left: str, experiment: str) -> None:
    client.set_terminated(left, "FINISHED")
    assert end_left_runs(client, root) == 0
    assert [run.info.status for run in runs_of(client, experiment)] == ["FINISHED"]
