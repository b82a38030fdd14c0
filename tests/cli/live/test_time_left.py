import pytest

from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.cli.live.search import SearchState
from sparsetune.cli.live.time_left import evaluation_time_left, search_time_left
from sparsetune.executor import StepDone
from tests.cli.live.events import evaluation, result, start, step, study


def test_an_evaluation_goes_on_as_it_went() -> None:
    state = EvaluationState.begun(evaluation(), 0.0)
    assert evaluation_time_left(state, 5.0).total is None
    for at in range(1, 11):
        state = state.stepped(StepDone("evaluation", "dense", at, 10, 0, 4))
    left = evaluation_time_left(state, 20.0)
    assert (left.total, left.basis) == (140.0, "2 s a step over 10 steps")


def test_a_calibration_foretells_itself_alone() -> None:
    state = SearchState.begun(study(), 0.0).calibrated(StepDone("calibration", "dense", 5, 10, 0, 2), 10.0)
    left = search_time_left(state, 10.0)
    assert left.phase == pytest.approx(10.0 / 1 * 15)  # the first event seen was for the fifth step
    assert left.total is None


def test_probes_foretell_trials_and_judging_by_their_renderings() -> None:
    state = SearchState.begun(study(n_trials=3), 0.0)
    for at in range(1, 11):
        state = state.probed(StepDone("sensitivity", "sparse", at, 10, 0, 4), float(at))
    left = search_time_left(state, 10.0)
    assert left.phase == 30.0
    # 3 trials of 2 prompts, and 4 eval prompts in 3 renderings each, at 10 s a rendering
    assert left.total == 30.0 + 60.0 + 120.0
    assert left.at_most and left.basis == "1 s a step over 10 steps"


def test_trials_go_on_at_the_rate_at_which_they_end_workers_at_once_included() -> None:
    state = SearchState.begun(study(n_trials=10), 0.0).trial_started(start(0), 0.0).trial_started(start(1), 0.0)
    state = state.trial_ended(result(0, seconds=20.0), 20.0).trial_ended(result(1, seconds=20.0), 20.0)
    left = search_time_left(state, 20.0)
    assert left.phase == 80.0
    # Judging has one process, so that it takes as long a rendering as a trial took itself.
    assert left.total == 80.0 + 4 * 3 * 10.0
    assert left.basis == "10 s a trial over 2 trials"


def test_the_first_trial_foretells_by_its_own_steps() -> None:
    state = SearchState.begun(study(n_trials=2), 0.0).trial_started(start(0), 0.0).trial_stepped(step(0, 0, 5), 5.0)
    left = search_time_left(state, 5.0)
    assert (left.phase, left.total) == (5.0 / 0.25 * 1.75, 35.0 + 4 * 3 * 10.0)


def test_max_minutes_ends_the_search_but_not_the_judging() -> None:
    state = SearchState.begun(study(n_trials=100, max_minutes=1.0), 0.0).trial_started(start(0), 0.0)
    state = state.trial_ended(result(0, seconds=20.0), 20.0)
    left = search_time_left(state, 20.0)
    assert (left.phase, left.total) == (40.0, 40.0 + 120.0)
    assert left.basis == "--max-minutes ends the search"


def test_trials_of_earlier_runs_are_not_waited_for() -> None:
    state = SearchState.begun(study(n_trials=10, num_done=8), 0.0).trial_started(start(8), 0.0)
    assert search_time_left(state.trial_ended(result(8, seconds=20.0), 20.0), 20.0).phase == 20.0


def test_before_anything_is_done_nothing_is_foretold() -> None:
    assert search_time_left(SearchState.begun(study(), 0.0), 9.0).phase is None
