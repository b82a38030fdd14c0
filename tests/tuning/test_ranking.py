"""Winners, objective values and Pareto fronts of trials with known metrics."""

import pytest

from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.search.ranking import (
    closest,
    directions,
    leaders,
    pareto_front,
    rank_correlation,
    values,
    winner,
)


def trial(
    number: int, sparsity: float, psnr: float, feasible: bool = True, seconds: float = 1.0, **more
) -> TrialResult:
    missing = {"psnr": 35.0 - psnr, "frame_cosine": -0.01}
    figures = {"sparsity": sparsity, "psnr": psnr, "psnr_worst": psnr, "frame_cosine": 0.96, "seconds_sparse": seconds}
    return TrialResult(number, {}, more.pop("state", "complete"), None, None, (), feasible=feasible, seconds=9.0,
                       shortfalls=missing, **figures, **more)  # fmt: skip


TRIALS = (trial(0, 0.1, 50.0, seconds=1.2), trial(1, 0.3, 36.0, seconds=1.1), trial(2, 0.25, 37.0, seconds=0.9),
          trial(3, 0.4, 34.0, feasible=False, seconds=0.5), trial(4, 0.2, 36.5))  # fmt: skip


def test_the_winner_passed_the_gate_and_is_best_at_the_goal() -> None:
    assert winner("sparsity", TRIALS).number == 1
    assert winner("speed", TRIALS).number == 2
    assert winner("pareto", TRIALS).number == 1
    assert winner("sparsity", TRIALS[3:4]) is None


def test_the_closest_misses_by_least() -> None:
    assert closest((trial(0, 0.3, 30.0, False), trial(1, 0.2, 34.0, False))).number == 1
    assert closest((trial(0, 0.3, 34.5, False, state="pruned"), trial(1, 0.2, 34.0, False))).number == 1


def test_the_leaders_are_the_winner_then_what_could_win_then_the_closest_to_the_gate() -> None:
    assert [each.number for each in leaders("sparsity", TRIALS, 3)] == [1, 2, 4]
    assert [each.number for each in leaders("speed", TRIALS, 9)] == [2, 4, 1, 0, 3]
    assert leaders("sparsity", (), 3) == ()


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    assert [each.number for each in pareto_front(TRIALS)] == [3, 1, 2, 0]


def test_values_follow_the_goal_and_a_penalty_undoes_what_a_miss_gains() -> None:
    assert values("sparsity", TRIALS[3]) == 0.4
    assert values("sparsity", TRIALS[3], penalised=True) == pytest.approx(0.35)
    assert values("speed", TRIALS[3], penalised=True) == pytest.approx(0.525)
    assert values("pareto", TRIALS[3]) == (0.4, 34.0)
    assert [len(directions(goal)) for goal in ("sparsity", "speed", "pareto")] == [1, 1, 2]


def test_rank_correlation_is_minus_one_where_error_predicts_psnr() -> None:
    pairs = [(0.01 * index, 50.0 - index) for index in range(5)]
    assert rank_correlation(pairs) == pytest.approx(-1.0)
    assert rank_correlation([*pairs, (None, 3.0)]) == pytest.approx(-1.0)
    assert rank_correlation(pairs[:3]) is None
    assert rank_correlation([(0.1, 40.0)] * 5) is None


def test_where_speed_is_the_goal_only_a_trial_that_is_faster_than_dense_wins() -> None:
    slower = trial(0, 0.3, 36.0, seconds=2.1, seconds_dense=2.0)
    within_noise = trial(1, 0.3, 36.0, seconds=1.97, seconds_dense=2.0, seconds_noise=0.01)
    faster = trial(2, 0.3, 36.0, seconds=1.9, seconds_dense=2.0, seconds_noise=0.01)
    assert winner("speed", (slower, within_noise)) is None
    assert winner("speed", (slower, within_noise, faster)) is faster
    assert winner("sparsity", (slower,)) is slower
    assert faster.speedup == pytest.approx(2.0 / 1.9)
