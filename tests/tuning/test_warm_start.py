import math
from collections.abc import Callable

import numpy as np
import pytest

from sparsetune.tuning.search.warm_start import CLOSE, Tried, next_budget

START = 0.02


def run(excess_db: Callable[[float], float], trials: int = 12) -> list[Tried]:
    """Search the budget at the gate for a known PSNR excess."""
    tried = [Tried(START, excess_db(START))]
    while len(tried) < trials and (budget := next_budget(tried, 0.002, 0.4)) is not None:
        tried.append(Tried(budget, excess_db(budget)))
    return tried


@pytest.mark.parametrize("best", [0.004, 0.0123, 0.0172, 0.03, 0.1, 0.3])
def test_the_budget_that_just_meets_the_gate_is_found_in_few_trials(best: float) -> None:
    tried = run(lambda budget: -7.0 * math.log2(budget / best) - math.log2(budget / best) ** 2)
    nearest = min(tried, key=lambda each: abs(each.excess_db))
    assert 1 / CLOSE < nearest.budget / best < CLOSE
    assert best / CLOSE**2 < max(each.budget for each in tried if each.excess_db >= 0) <= best
    assert len(tried) <= 5


def test_noise_of_the_prompts_moves_it_by_little() -> None:
    noise = np.random.default_rng(0)
    off = []
    for _ in range(50):
        tried = run(lambda budget: -6.0 * math.log2(budget / 0.017) + noise.normal(0, 0.7), trials=6)
        off.append(abs(math.log2(min(tried, key=lambda each: abs(each.excess_db)).budget / 0.017)))
    assert np.mean(off) < 0.7 / 6.0  # less than what one trial's noise would


def test_nothing_known_and_the_ends_of_the_range_end_it() -> None:
    assert next_budget([], 0.01, 0.4) is None
    assert run(lambda _: 1.0)[-1].budget == 0.4
    assert run(lambda _: -1.0)[-1].budget == 0.002
    assert next_budget([Tried(0.05, 1.0), Tried(0.051, -1.0)], 0.01, 0.4) is None


def test_a_budget_that_misses_by_a_hair_leads_to_one_below_it() -> None:
    tried = [Tried(0.01, 5.0), Tried(0.02, -0.1), Tried(0.04, -6.5)]
    assert 0.018 < (next_budget(tried, 0.002, 0.4) or 0.0) < 0.0195


def test_one_that_misses_below_one_that_holds_is_noise() -> None:
    assert 0.04 < (next_budget([Tried(0.01, -0.1), Tried(0.04, 1.0)], 0.002, 0.4) or 0.0) < 0.2
