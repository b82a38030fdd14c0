import sqlite3
import time
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage

from sparsetune.tuning.heartbeat import Heartbeat


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats are Optuna's experiment, and it wants them left to `optimize`
        yield


def beats(database: Path) -> dict[int, str]:
    with sqlite3.connect(database) as connection:
        return dict(connection.execute("select trial_id, heartbeat from trial_heartbeats"))


def test_one_thread_gives_signs_of_life_for_every_trial_under_way(tmp_path: Path) -> None:
    database = tmp_path / "optuna.db"
    study = optuna.create_study(storage=RDBStorage(f"sqlite:///{database}", heartbeat_interval=1), study_name="a")
    heartbeat, trials = Heartbeat("a"), [study.ask() for _ in range(3)]
    for trial in trials[:2]:
        heartbeat.add(trial)
    before = beats(database)
    assert len(before) == 2
    heartbeat.remove(trials[0])
    end = time.monotonic() + 20.0
    while beats(database)[2] == before[2] and time.monotonic() < end:
        time.sleep(0.2)
    heartbeat.stop()
    after = beats(database)
    assert after[2] > before[2]
    assert (after[1], len(after)) == (before[1], 2)


def test_a_storage_without_signs_of_life_needs_none() -> None:
    study = optuna.create_study(study_name="b")
    heartbeat = Heartbeat("b")
    heartbeat.add(study.ask())
    heartbeat.stop()
