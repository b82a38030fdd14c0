import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from sparsetune.errors import MetricError
from sparsetune.metrics import bootstrap_mean, paired_difference, summarize

VALUES = (38.2, 35.1, 41.7, 29.9, 36.4, 33.8, 40.0, 37.3)


def test_a_summary_has_the_samples_figures():
    summary = summarize(VALUES)
    assert summary.mean == pytest.approx(np.mean(VALUES))
    assert summary.std == pytest.approx(np.std(VALUES, ddof=1))
    assert (summary.min, summary.max) == (29.9, 41.7)
    assert summary.ci95_low < summary.mean < summary.ci95_high
    assert summary.to_dict().keys() == {"mean", "std", "min", "max", "ci95_low", "ci95_high"}


def test_the_interval_agrees_with_scipys_bootstrap():
    expected = bootstrap(
        (VALUES,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_mean(VALUES, resamples=50_000) == pytest.approx((expected.low, expected.high), abs=0.05)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_mean(generator.normal(size=30), resamples=500)
        hits += low <= 0 <= high
    assert 0.85 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval():
    assert summarize(VALUES, seed=3) == summarize(VALUES, seed=3)
    assert summarize(VALUES, seed=3) != summarize(VALUES, seed=4)


def test_global_random_state_is_neither_read_nor_changed():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    summarize(VALUES)
    assert (np.random.get_state()[1] == before).all()


def test_a_single_value_is_its_own_interval():
    summary = summarize([37.5])
    assert (summary.mean, summary.std, summary.ci95_low, summary.ci95_high) == (37.5, 0.0, 37.5, 37.5)


def test_many_values_are_resampled_in_slabs():
    low, high = bootstrap_mean(np.linspace(0, 1, 200_000), resamples=20)
    assert low == pytest.approx(0.5, abs=0.01) and high == pytest.approx(0.5, abs=0.01)


def test_paired_differences_count_in_the_metrics_direction():
    before, after = (30.0, 31.0, 32.0, 33.0), (31.0, 33.0, 31.0, 33.0)
    higher = paired_difference(before, after)
    assert higher.mean == 0.5 and higher.differences == (1.0, 2.0, -1.0, 0.0)
    assert (higher.better, higher.worse, higher.equal) == (2, 1, 1)
    lower = paired_difference(before, after, higher_is_better=False)
    assert (lower.better, lower.worse, lower.equal) == (1, 2, 1)
    assert not higher.significant


def test_pairing_sees_what_unpaired_spread_hides():
    before = np.linspace(20, 45, 10)
    after = before + 0.5 + 0.05 * np.sin(np.arange(10))
    difference = paired_difference(before, after)
    assert difference.significant and difference.ci95_low > 0.4
    assert difference.to_dict()["significant"] is True


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(wrong):
    with pytest.raises(MetricError, match=f"finite values, got {wrong}"):
        summarize([1.0, wrong])


def test_no_values_are_refused():
    with pytest.raises(MetricError, match="at least one value"):
        summarize([])


def test_pairs_of_different_length_are_refused():
    with pytest.raises(MetricError, match="2 before and 1 after"):
        paired_difference([1.0, 2.0], [1.0])


def test_too_few_resamples_are_refused():
    with pytest.raises(MetricError, match="resamples must be at least 1, got 0"):
        bootstrap_mean([1.0, 2.0], resamples=0)
