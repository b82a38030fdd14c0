from sparsetune.cli.live.search import SearchState
from sparsetune.executor import StepDone
from tests.cli.live.events import evaluation, prompt, result, start, step, study


def begun(**options: object) -> SearchState:
    return SearchState.begun(study(**options), 0.0)  # type: ignore[arg-type]


def phases(state: SearchState) -> dict[str, str]:
    return {
        phase.name: "running" if phase.running else "ended" if phase.ended is not None else "none"
        for phase in state.phases
    }


def test_phases_follow_one_another_as_their_events_come() -> None:
    state = begun().calibrated(StepDone("calibration", "dense", 1, 10, 0, 2), 1.0)
    assert phases(state) == {"calibrate": "running", "probe": "none", "trials": "none", "judge": "none"}
    state = state.calibrated(StepDone("calibration", "dense", 10, 10, 1, 2), 20.0).probed(
        StepDone("sensitivity", "sparse", 1, 10, 0, 4), 23.0
    )
    assert phases(state) == {"calibrate": "ended", "probe": "running", "trials": "none", "judge": "none"}
    assert state.phases[0].seconds(99.0) == 20.0
    assert state.phases[1].started == 20.0  # its first step took the time since the last event
    state = state.trial_started(start(0), 50.0)
    assert phases(state) == {"calibrate": "ended", "probe": "ended", "trials": "running", "judge": "none"}
    assert phases(state.won(result(0), 60.0))["judge"] == "running"


def test_phases_that_an_earlier_run_has_measured_never_begin() -> None:
    state = begun(num_done=3).trial_started(start(3), 1.0)
    assert phases(state) == {"calibrate": "none", "probe": "none", "trials": "running", "judge": "none"}


def test_every_tuner_has_phases_of_its_own() -> None:
    state = begun(tuner="calibrate")
    assert [phase.name for phase in state.phases] == ["calibrate", "refine", "trials", "judge"]
    state = state.calibrated(StepDone("calibration", "dense", 10, 10, 1, 2), 1.0).refined(
        StepDone("refinement", "dense", 1, 10, 1, 2), 5.0
    )
    assert phases(state) == {"calibrate": "ended", "refine": "running", "trials": "none", "judge": "none"}
    refine = state.named("refine")
    assert (refine.done, refine.kept, refine.total, refine.started) == (11.0, 10.0, 20.0, 1.0)
    state = begun(tuner="builtin").calibrated(StepDone("calibration", "dense", 5, 10, 0, 1), 1.0)
    assert phases(state) == {"search": "running", "trials": "none", "judge": "none"}


def test_probes_that_are_taken_up_in_the_middle_count_as_done() -> None:
    state = begun().probed(StepDone("sensitivity", "sparse", 1, 10, 2, 4), 1.0)
    probe = state.named("probe")
    assert (probe.done, probe.kept, probe.total) == (21.0, 20.0, 40.0)


def test_trials_at_once_are_kept_apart_by_number() -> None:
    state = begun().trial_started(start(0, "a:cuda:0"), 0.0).trial_started(start(1, "b:cuda:1"), 1.0)
    state = state.trial_stepped(step(1, 0, 4), 2.0).trial_stepped(step(0, 1, 5), 3.0)
    state = state.trial_judged(prompt(1, 0, 37.5), 4.0)
    assert [(trial.worker, trial.index, trial.step) for trial in state.running.values()] == [
        ("a:cuda:0", 1, 5), ("b:cuda:1", 1, 0),
    ]  # fmt: skip
    assert state.running[1].psnrs == (37.5,)
    assert state.named("trials").done == 0.75 + 0.5
    state = state.trial_ended(result(1), 5.0)
    assert list(state.running) == [0]
    assert state.named("trials").done == 1.75


def test_a_trial_that_another_worker_takes_over_begins_anew() -> None:
    state = begun().trial_started(start(0, "a"), 0.0).trial_stepped(step(0, 1, 5), 1.0)
    again = state.trial_started(start(0, "b"), 2.0)
    assert (again.running[0].worker, again.running[0].fraction) == ("b", 0.0)


def test_events_of_trials_that_are_not_in_hand_change_nothing() -> None:
    state = begun()
    assert state.trial_stepped(step(7, 0, 1), 1.0) is state
    assert state.trial_judged(prompt(7, 0, 40.0), 1.0) is state


def test_the_best_is_what_the_search_would_choose() -> None:
    state = begun()
    for trial in (result(0, 0.2, 40.0), result(1, 0.3, 36.0), result(2, 0.5, 30.0), result(3, None, None, "failed")):
        state = state.trial_ended(trial, 1.0)
    assert state.best is not None and state.best.number == 1
    assert (state.num_failed, state.num_pruned) == (1, 0)


def test_a_winner_of_an_earlier_run_is_the_best() -> None:
    state = begun(num_done=12).won(result(4, 0.4, 37.0), 1.0)
    assert state.best is not None and state.best.number == 4


def test_the_judging_foresees_that_the_second_evaluation_renders_no_dense_video() -> None:
    state = begun().won(result(0), 0.0).evaluation_begun(evaluation(use_tuned=False), 0.0)
    assert state.named("judge").total == 4 * 2 * 10 + 4 * 10
    first = state.evaluations[0].stepped(StepDone("evaluation", "dense", 10, 10, 0, 4, cached=True))
    state = state.evaluation_went_on(first, 1.0)
    assert state.named("judge").total == 110
    state = state.evaluation_begun(evaluation(), 2.0)
    assert [one.policy for one in state.evaluations] == ["default", "tuned"]
    assert state.named("judge").total == 70 + 40
