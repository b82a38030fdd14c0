"""Time of a tuning by phase."""

from pathlib import Path
from typing import Any

from sparsetune.executor import PHASES, StepDone
from sparsetune.tuning.events import PhaseClock


class ManualClock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_belongs_to_the_phase_whose_event_ends_it() -> None:
    timer = ManualClock()
    clock = PhaseClock(timer)
    unused: Any = None
    events = [
        (1.0, lambda: clock.on_study_start(unused)),
        (5.0, lambda: clock.on_step(StepDone("calibration", "dense", 1, 2, 0, 1))),
        (5.0, lambda: clock.on_step(StepDone("calibration", "dense", 2, 2, 0, 1))),
        (4.0, lambda: clock.on_step(StepDone("refinement", "dense", 1, 1, 0, 1))),
        (7.0, lambda: clock.on_step(StepDone("sensitivity", "sparse", 1, 1, 0, 1))),
        (2.0, lambda: clock.on_trial_start(unused)),  # the evaluation of the last sensitivity video
        (20.0, lambda: clock.on_step(StepDone("trials", "sparse", 1, 1, trial=0))),
        (1.0, lambda: clock.on_prompt(unused)),
        (1.0, lambda: clock.on_trial(unused)),
        (0.5, lambda: clock.on_winner(unused, Path())),
        (30.0, lambda: None),
    ]
    for seconds, happens in events:
        timer.now += seconds
        happens()
    assert clock.stop() == {
        "preparation": 1.0, "calibration": 10.0, "refinement": 4.0, "sensitivity": 9.0, "trials": 22.5,
        "evaluation": 30.0,
    }  # fmt: skip


def test_phases_add_up_to_the_whole_and_stand_in_order() -> None:
    timer = ManualClock()
    clock = PhaseClock(timer)
    clock.restart(90.0)
    unused: Any = None
    for happens in (clock.on_trial_start, clock.on_study_start, clock.on_trial):
        timer.now += 3.0
        happens(unused)
    timer.now += 1.0
    found = clock.stop()
    assert sum(found.values()) == timer.now - 90.0
    assert list(found) == [phase for phase in PHASES if phase in found]


def test_a_tuner_without_calibration_prepares_until_its_trial() -> None:
    timer = ManualClock()
    clock = PhaseClock(timer)
    unused: Any = None
    timer.now += 50.0
    clock.on_trial_start(unused)
    timer.now += 4.0
    clock.on_trial(unused)
    assert clock.stop() == {"preparation": 50.0, "trials": 4.0}
