"""A study of several processes, recorded in a real store as one run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient

from sparsetune.config import Config
from sparsetune.tracking import TrackingListener
from sparsetune.tuning.events import StudyState
from tests.tracking.conftest import runs_of
from tests.tracking.test_log_study import STUDY_RUN, TRIALS, ended, started


class Together(StudyState):
    """Processes on one study: the trials each stores, and the number that the others run."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.running = 0

    def num_running_elsewhere(self) -> int:
        return self.running

    def update_attr(self, key: str, change: Callable[[str | None], str]) -> str:
        self.kept[key] = change(self.kept.get(key))
        return self.kept[key]


def begin(config: Config, others: Together, num_done: int = 0) -> TrackingListener:
    listener = TrackingListener(config)
    listener.on_study_start(replace(started(config, num_done), study=others))
    return listener


def test_processes_that_start_at_once_record_one_run_and_each_trial_once(
    config: Config, client: MlflowClient, experiment: str
) -> None:
    others = Together()
    listeners = [begin(config, others) for _ in range(3)]
    for listener, trial in zip(listeners, TRIALS, strict=True):
        listener.on_trial(trial)
    judging, *leaving = listeners
    recalled = tuple(replace(trial, prompts=()) for trial in TRIALS)
    for listener in leaving:
        listener.on_study_end(ended(recalled, recalled[0], left_to="another process judges it"))
        listener.recorder.abandon()  # what happens when the process exits
    assert client.get_run(judging.run_id).info.status == "RUNNING"
    judging.on_study_end(ended(recalled, recalled[0]))
    runs = {run.info.run_name: run for run in runs_of(client, experiment)}
    assert sorted(runs) == ["trial 0", "trial 1", "trial 2", STUDY_RUN]
    assert {listener.run_id for listener in listeners} == {runs[STUDY_RUN].info.run_id}
    assert runs[STUDY_RUN].info.status == "FINISHED"
    table = client.download_artifacts(runs[STUDY_RUN].info.run_id, "trials.json")
    rows = json.loads(Path(table).read_text())
    named = [row[rows["columns"].index("run_id")] for row in rows["data"]]
    assert named == [runs[f"trial {number}"].info.run_id for number in range(3)]


def test_only_the_first_process_samples_its_machine(config: Config) -> None:
    others = Together()
    first, second = begin(config, others), begin(config, others)
    assert first._monitor is not None and second._monitor is None
    others.running = 1
    assert begin(config, others, num_done=2)._monitor is None
    others.running = 0
    assert begin(config, others, num_done=2)._monitor is not None


def test_a_process_that_fails_leaves_the_run_to_the_others_and_the_last_one_ends_it(
    config: Config, client: MlflowClient
) -> None:
    others = Together()
    first, second = begin(config, others), begin(config, others)
    others.running = 1
    first.on_failure(KeyboardInterrupt())
    first.recorder.abandon()
    assert client.get_run(first.run_id).info.status == "RUNNING"
    others.running = 0
    second.on_failure(KeyboardInterrupt())
    assert client.get_run(first.run_id).info.status == "KILLED"


def test_a_study_whose_run_was_deleted_gets_a_new_one(config: Config, client: MlflowClient) -> None:
    others = Together()
    first = begin(config, others)
    first.on_study_end(ended(TRIALS))
    client.delete_run(first.run_id)
    second = begin(config, others, num_done=3)
    assert second.run_id != first.run_id and list(others.kept.values()) == [second.run_id]
