"""Who runs a trial: processes of this host and of others, alive, dead and hanging."""

import os
import subprocess
import sys
import time

import optuna
import pytest

from sparsetune.tuning.search.owner import OWNER, PULSE, Watch, is_ours, pulsing, this_process


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study()


def trial_of(study: optuna.Study, owner: object) -> optuna.Trial:
    trial = study.ask()
    if owner is not None:
        trial.set_user_attr(OWNER, owner)
    return trial


def frozen(study: optuna.Study, trial: optuna.Trial) -> optuna.trial.FrozenTrial:
    return study.trials[trial.number]


@pytest.fixture(scope="module")
def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_this_process_lives_and_an_ended_one_of_this_host_is_dead_at_once(study, ended_process: int) -> None:
    host, _, namespace, token = this_process()
    ours, ended = trial_of(study, this_process()), trial_of(study, [host, ended_process, namespace, token])
    assert is_ours(frozen(study, ours)) and not is_ours(frozen(study, ended))
    assert not Watch(0.0).is_dead(frozen(study, ours))
    assert Watch().is_dead(frozen(study, ended))


def test_an_earlier_process_with_our_id_is_dead(study) -> None:
    # As a container's first process is, whose id is 1 again after each restart.
    host, process, namespace, _ = this_process()
    assert Watch().is_dead(frozen(study, trial_of(study, [host, process, namespace, "an earlier one"])))


def test_a_trial_that_nobody_owns_was_left_by_one_that_died_as_it_took_it(study) -> None:
    assert Watch().is_dead(frozen(study, trial_of(study, None)))


@pytest.mark.parametrize("owner", [["elsewhere", 1, "pid:[1]", "t"], ["elsewhere", 1], [None, os.getppid(), None, "t"]])
def test_one_elsewhere_is_dead_when_its_pulse_was_seen_to_stand_still(study, owner: list[object]) -> None:
    if owner[0] is None:  # another process of this host that lives, but maybe isn't the one that took the trial
        owner = [this_process()[0], owner[1], this_process()[2], "t"]
    trial, watch = trial_of(study, owner), Watch(grace=0.2)
    for count in range(3):
        trial.set_user_attr(PULSE, count)
        assert not watch.is_dead(frozen(study, trial))
        time.sleep(0.15)
    time.sleep(0.1)
    assert watch.is_dead(frozen(study, trial))


def test_only_our_own_trials_pulse_and_only_as_long_as_they_run(study) -> None:
    ours, others = trial_of(study, this_process()), trial_of(study, ["elsewhere", 1, "", ""])
    ended = trial_of(study, this_process())
    study.tell(ended, 1.0)
    with pulsing(study, 0.02):
        end = time.monotonic() + 10.0
        while frozen(study, ours).user_attrs.get(PULSE, 0) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert frozen(study, ours).user_attrs[PULSE] >= 3
    assert PULSE not in frozen(study, others).user_attrs and PULSE not in frozen(study, ended).user_attrs
