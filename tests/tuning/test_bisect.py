import pytest

from sparsetune.tuning.bisect import CLOSE, Tried, next_budget


def run(best: float, start: float, trials: int = 12) -> list[Tried]:
    """Bisect for a known best budget."""
    tried = [Tried(start, start <= best)]
    while len(tried) < trials and (budget := next_budget(tried, 0.01, 0.4)) is not None:
        tried.append(Tried(budget, budget <= best))
    return tried


@pytest.mark.parametrize("best", [0.02, 0.05, 0.066, 0.1, 0.3])
@pytest.mark.parametrize("start", [0.05, 0.1])
def test_the_best_budget_is_found(best: float, start: float) -> None:
    tried = run(best, start)
    held = max(each.budget for each in tried if each.feasible)
    assert best / CLOSE <= held <= best


def test_nothing_known_and_the_ends_of_the_range_end_it() -> None:
    assert next_budget([], 0.01, 0.4) is None
    assert run(1.0, 0.3)[-1] == Tried(0.4, True)
    assert run(0.001, 0.012)[-1] == Tried(0.01, False)
    assert next_budget([Tried(0.05, True), Tried(0.051, False)], 0.01, 0.4) is None


def test_a_budget_that_failed_below_one_that_held_is_noise() -> None:
    tried = [Tried(0.04, False), Tried(0.05, True), Tried(0.0722, False)]
    assert next_budget(tried, 0.01, 0.4) == pytest.approx(0.06008, abs=1e-4)
