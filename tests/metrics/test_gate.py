import math

import pytest

from sparsetune.errors import MetricError
from sparsetune.metrics import Gate

GOOD = {"frame_cosine": 0.99, "psnr": 38.0, "psnr_frame_min": 33.0}
POOR = {"frame_cosine": 0.96, "psnr": 30.0, "psnr_frame_min": 21.0}


def test_good_prompts_pass():
    result = Gate().check([GOOD, GOOD])
    assert result.passed and result.failures == ()
    assert [str(condition) for condition in result.conditions] == [
        "mean frame_cosine 0.9900 > 0.95",
        "mean psnr 38.00 dB > 35 dB",
    ]


def test_a_failure_names_the_condition_with_its_figures():
    result = Gate().check([GOOD, POOR])
    assert not result.passed
    assert result.failures == ("mean psnr 34.00 dB <= 35 dB",)


def test_a_value_on_the_bound_fails():
    assert not Gate().check([{"frame_cosine": 0.95, "psnr": 50.0}]).passed
    assert not Gate().check([{"frame_cosine": 1.0, "psnr": 35.0}]).passed


def test_a_figure_just_under_the_bound_is_not_rounded_onto_it():
    result = Gate().check([{"frame_cosine": 0.9500001, "psnr": 35.0001}])
    assert result.passed
    assert [str(condition) for condition in result.conditions] == [
        "mean frame_cosine 0.950000100 > 0.95",
        "mean psnr 35.0001 dB > 35 dB",
    ]


def test_the_worst_prompt_can_be_bounded():
    rows = [GOOD, GOOD, GOOD, POOR]
    assert Gate().check(rows).passed
    result = Gate(min_psnr_worst=32.0).check(rows)
    assert result.failures == ("worst prompt's psnr 30.00 dB <= 32 dB",)


def test_the_worst_frame_can_be_bounded():
    gate = Gate(min_psnr_frame=25.0)
    assert gate.metrics == ("frame_cosine", "psnr", "psnr_frame_min")
    assert gate.check([GOOD]).passed
    assert gate.check([GOOD, GOOD, POOR, GOOD]).failures == ("worst frame's psnr 21.00 dB <= 25 dB",)


def test_failed_prompts_fail_the_gate():
    result = Gate().check([GOOD, GOOD], num_failed=1)
    assert result.failures == ("1 of 3 prompts failed to render",)


def test_nothing_measured_fails_the_gate():
    assert Gate().check([]).failures == ("no prompt was measured",)
    assert Gate().check([], num_failed=2).failures == ("2 of 2 prompts failed to render",)


def test_a_missing_metric_is_said():
    with pytest.raises(MetricError, match="needs psnr_frame_min of every prompt"):
        Gate(min_psnr_frame=25.0).check([{"frame_cosine": 1.0, "psnr": 40.0}])


def test_bounds_must_be_finite():
    with pytest.raises(MetricError, match="min_psnr must be a finite number, got nan"):
        Gate(min_psnr=math.nan)


def test_the_result_is_json():
    found = Gate().check([POOR]).to_dict()
    assert found["passed"] is False and found["failures"] == ["mean psnr 30.00 dB <= 35 dB"]
    assert found["conditions"][0] == {
        "name": "mean frame_cosine",
        "unit": "",
        "measured": 0.96,
        "bound": 0.95,
        "met": True,
    }
