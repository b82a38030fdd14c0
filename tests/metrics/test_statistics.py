import math

import numpy as np
import pytest
from scipy import stats

from sparsetune.errors import MetricError
from sparsetune.metrics import (
    holm,
    inferiority,
    interval_caveat,
    mean_interval,
    needed_pairs,
    paired_difference,
    relative_error,
    summarize,
)

VALUES = (38.2, 35.1, 41.7, 29.9, 36.4, 33.8, 40.0, 37.3)


def test_a_summary_has_the_samples_figures():
    summary = summarize(VALUES)
    assert summary.mean == pytest.approx(np.mean(VALUES))
    assert summary.std == pytest.approx(np.std(VALUES, ddof=1))
    assert (summary.min, summary.max) == (29.9, 41.7)
    assert summary.ci95_low < summary.mean < summary.ci95_high
    assert summary.to_dict().keys() == {"mean", "std", "min", "max", "ci95_low", "ci95_high"}


def test_the_interval_is_scipys_t_interval():
    expected = stats.t.interval(0.95, len(VALUES) - 1, loc=np.mean(VALUES), scale=stats.sem(VALUES))
    assert mean_interval(VALUES) == pytest.approx(expected)
    assert (summarize(VALUES).ci95_low, summarize(VALUES).ci95_high) == pytest.approx(expected)


def test_a_single_value_has_no_deviation_and_no_interval():
    summary = summarize([37.5])
    assert (summary.mean, summary.min, summary.max) == (37.5, 37.5, 37.5)
    assert summary.std is summary.ci95_low is summary.ci95_high is None


def test_paired_differences_count_in_the_metrics_direction():
    before, after = (30.0, 31.0, 32.0, 33.0), (31.0, 33.0, 31.0, 33.0)
    higher = paired_difference(before, after)
    assert higher.mean == 0.5 and higher.differences == (1.0, 2.0, -1.0, 0.0)
    assert (higher.better, higher.worse, higher.equal) == (2, 1, 1)
    lower = paired_difference(before, after, higher_is_better=False)
    assert (lower.better, lower.worse, lower.equal) == (1, 2, 1)
    assert (higher.worst, lower.worst) == (-1.0, 2.0)
    assert not higher.significant


def test_significance_is_that_of_the_paired_t_test():
    before, after = (30.0, 31.0, 32.0, 33.0), (31.0, 33.0, 31.0, 34.0)
    expected = stats.ttest_rel(after, before).pvalue
    assert paired_difference(before, after).p_value == pytest.approx(expected)
    assert paired_difference([1.0], [2.0]).p_value is None
    assert not paired_difference([1.0], [2.0]).significant


def test_equal_values_do_not_differ_and_a_constant_shift_does():
    assert paired_difference([30.0, 31.0], [30.0, 31.0]).p_value == 1.0
    assert paired_difference([30.0, 31.0], [30.5, 31.5]).p_value == 0.0


def test_p_values_are_corrected_for_the_number_of_tests():
    # Holm 1979: the smallest times 4, the next times 3, never below one before it, never above 1
    assert holm([0.04, 0.01, None, 0.03, 0.6]) == pytest.approx((0.09, 0.04, None, 0.09, 0.6), nan_ok=True)
    assert holm([]) == ()


def test_non_inferiority_is_the_one_sided_t_test_against_the_margin():
    differences = (-0.3, 0.1, 0.2, -0.2, 0.0, 0.1)
    test = inferiority(differences, 0.5, typical_std=1.0)
    expected = stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue
    assert (test.verdict == "no worse") == (expected < 0.05) and expected < 0.05
    assert test.low == pytest.approx(stats.t.interval(0.9, 5, np.mean(differences), stats.sem(differences))[0])
    assert (test.worst, test.num_pairs) == (-0.3, 6)


def test_a_constant_loss_above_the_margin_is_worse_and_below_it_is_none():
    assert inferiority([-0.6] * 4, 0.5, typical_std=1.0).verdict == "worse"
    assert inferiority([-0.4] * 4, 0.5, typical_std=1.0).verdict == "no worse"


def test_one_lucky_prompt_does_not_make_up_for_the_others():
    assert inferiority([-0.8] * 5 + [62.0], 0.5, typical_std=1.0).verdict == "unclear"


def test_a_single_pair_cannot_tell_and_asks_for_the_pairs_of_a_typical_deviation():
    test = inferiority([3.0], 0.5, typical_std=1.0)
    assert (test.verdict, test.low, test.detectable, test.needed) == ("unclear", None, None, 27)


def test_the_margin_must_be_positive():
    with pytest.raises(MetricError, match="margin must be greater than 0, got 0"):
        inferiority([1.0, 2.0], 0.0, typical_std=1.0)


@pytest.mark.parametrize(("std", "pairs"), [(0.0, 2), (0.5, 8), (1.0, 27), (2.0, 101), (1e6, 100_000)])
def test_more_deviation_needs_more_pairs(std, pairs):
    assert needed_pairs(std, 0.5) == pairs


def test_few_prompts_are_said_to_miss_rare_failures():
    assert interval_caveat(1) == "1 prompt has no interval; use at least 2"
    assert "4 prompts include none of those with probability 0.66" in interval_caveat(4)
    assert interval_caveat(28) is not None and interval_caveat(29) is None
    assert interval_caveat(0) is None


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


def test_the_relative_error_is_the_mean_s_own():
    """A drift that hits both sides of a ratio isn't in it."""
    values = [1.8, 2.2, 1.8, 2.2]
    assert relative_error(values) == pytest.approx(np.std(values, ddof=1) / 2.0 / 2.0)
    assert relative_error([2.0, 2.0]) == 0.0
    assert relative_error([2.0]) is None
