import math

import numpy as np
import pytest

from sparsetune.errors import MetricError
from sparsetune.metrics import Gate, pooled_psnr, psnr

GOOD = {"frame_cosine": 0.99, "psnr": 38.0, "psnr_frame_min": 33.0}
POOR = {"frame_cosine": 0.96, "psnr": 30.0, "psnr_frame_min": 21.0}


def test_good_prompts_pass():
    result = Gate().check([GOOD, GOOD])
    assert result.passed and result.failures == ()
    assert [str(condition) for condition in result.conditions] == [
        "mean frame_cosine 0.9900 > 0.95",
        "mean psnr 38.00 dB > 35 dB",
        "pooled psnr 38.00 dB > 35 dB",
        "worst prompt's psnr 38.00 dB > 28 dB",
    ]


def test_a_failure_names_the_condition_with_its_figures():
    result = Gate().check([GOOD, POOR])
    assert not result.passed
    assert result.failures == ("mean psnr 34.00 dB <= 35 dB", "pooled psnr 32.37 dB <= 35 dB")


LOSSY = {"frame_cosine": 0.97, "psnr": 29.75, "frame_l1": 0.03}
IDENTICAL = {"frame_cosine": 1.0, "psnr": 100.0, "frame_l1": 0.0}


def test_an_identical_pair_does_not_carry_the_gate():
    result = Gate().check([*[LOSSY] * 5, IDENTICAL])
    assert result.failures == ("mean psnr 29.75 dB <= 35 dB", "pooled psnr 29.75 dB <= 35 dB")
    assert result.num_identical == 1


@pytest.mark.parametrize("psnr", [60.0, 80.0, 99.9])
def test_nor_does_one_that_is_nearly_identical(psnr):
    result = Gate().check([*[LOSSY] * 5, IDENTICAL | {"psnr": psnr}])
    assert not result.passed and result.num_identical == 0
    pooled = next(one.measured for one in result.conditions if one.name == "pooled psnr")
    assert pooled <= 29.75 + 10 * math.log10(6 / 5) + 1e-3


def test_where_all_pairs_are_identical_the_gate_is_met():
    result = Gate().check([IDENTICAL] * 3)
    assert result.passed and result.num_identical == 3
    assert {one.measured for one in result.conditions} == {1.0, 100.0}


def test_the_pooled_psnr_is_that_of_the_videos_joined():
    generator = np.random.default_rng(5)
    dense = [generator.integers(0, 256, (2, 16, 16, 3), np.uint8) for _ in range(3)]
    sparse = [np.clip(video + generator.integers(-reach, reach + 1, video.shape), 0, 255).astype(np.uint8)
              for video, reach in zip(dense, (2, 9, 40), strict=True)]  # fmt: skip
    each = [psnr(*pair) for pair in zip(dense, sparse, strict=True)]
    assert pooled_psnr(each) == pytest.approx(psnr(np.concatenate(dense), np.concatenate(sparse)), abs=1e-9)
    assert pooled_psnr([100.0, 100.0]) == 100.0


def test_a_value_on_the_bound_fails():
    assert not Gate().check([{"frame_cosine": 0.95, "psnr": 50.0}]).passed
    assert not Gate().check([{"frame_cosine": 1.0, "psnr": 35.0}]).passed


def test_a_figure_just_under_the_bound_is_not_rounded_onto_it():
    result = Gate().check([{"frame_cosine": 0.9500001, "psnr": 35.0001}])
    assert result.passed
    assert [str(condition) for condition in result.conditions] == [
        "mean frame_cosine 0.950000100 > 0.95",
        "mean psnr 35.0001 dB > 35 dB",
        "pooled psnr 35.0001 dB > 35 dB",
        "worst prompt's psnr 35.00 dB > 28 dB",
    ]


def test_the_worst_prompt_can_be_bounded():
    rows = [*[GOOD] * 3, GOOD | {"psnr": 33.0}]
    assert Gate().check(rows).passed
    result = Gate(min_psnr_worst=34.0).check(rows)
    assert result.failures == ("worst prompt's psnr 33.00 dB <= 34 dB",)
    assert Gate(30.0 / 100, 20.0, None).check([POOR | {"psnr": 20.5}]).passed


def test_by_default_no_prompt_may_fall_under_28_db():
    assert Gate().check([*[GOOD] * 20, GOOD | {"psnr": 27.0}]).failures == ("worst prompt's psnr 27.00 dB <= 28 dB",)


def test_the_worst_frame_can_be_bounded():
    gate = Gate(min_psnr_frame=25.0)
    assert gate.metrics == ("frame_cosine", "psnr", "psnr_frame_min")
    assert gate.check([GOOD]).passed
    poor = GOOD | {"psnr_frame_min": 21.0}
    assert gate.check([GOOD, GOOD, poor, GOOD]).failures == ("worst frame's psnr 21.00 dB <= 25 dB",)


def test_failed_prompts_fail_the_gate():
    result = Gate().check([GOOD, GOOD], num_failed=1)
    assert result.failures == ("1 of 3 prompts failed to render",)


def test_nothing_measured_fails_the_gate():
    assert Gate().check([]).failures == ("no prompt was measured",)
    assert Gate().check([], num_failed=2).failures == ("2 of 2 prompts failed to render",)


def test_a_missing_metric_fails_the_gate_and_stops_a_search():
    gate, rows = Gate(min_psnr_frame=25.0), [{"frame_cosine": 1.0, "psnr": 40.0}]
    assert gate.check(rows).failures == ("psnr_frame_min could not be computed for every prompt",)
    with pytest.raises(MetricError, match="needs psnr_frame_min of every prompt"):
        gate.conditions(rows)


def test_any_registered_metric_can_be_bounded():
    gate = Gate(min_metrics=("ssim=.9", "vmaf=80"), max_metrics=("lpips=.1",))
    assert gate.metrics == ("frame_cosine", "psnr", "ssim", "vmaf", "lpips")
    rows = [GOOD | {"ssim": 0.95, "vmaf": 90.0, "lpips": 0.05}, GOOD | {"ssim": 0.83, "vmaf": 95.0, "lpips": 0.15}]
    result = gate.check(rows)
    assert result.failures == ("mean ssim 0.8900 <= 0.9", "mean lpips 0.1000 >= 0.1")
    assert str(result.conditions[-2]) == "mean vmaf 92.50 > 80"
    assert [one.shortfall for one in result.conditions[-3:]] == pytest.approx([0.01, -12.5, 0.0])
    assert gate.check(rows[:1]).passed


def test_an_optional_bound_holds_only_where_its_metric_was_computed():
    gate = Gate(max_metrics=("lpips?=.1",))
    assert gate.check([GOOD]).passed
    assert gate.check([GOOD | {"lpips": 0.2}]).failures == ("mean lpips 0.2000 >= 0.1",)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_metrics": ("lpips=.1",)}, "lower values of lpips are better; bound it with --gate-max lpips=.1"),
        ({"max_metrics": ("ssim=.9",)}, "higher values of ssim are better; bound it with --gate-min ssim=.9"),
        ({"min_metrics": ("sssim=.9",)}, "unknown metric 'sssim'; choose from ssim"),
        ({"min_metrics": ("ssim",)}, r"--gate-min must be NAME=VALUE with a finite number, e.g. ssim=.9, got 'ssim'"),
    ],
)
def test_a_wrong_bound_is_said(bounds, message):
    with pytest.raises(MetricError, match=message):
        Gate(**bounds)


def test_a_margin_counts_a_hundredth_as_a_decibel():
    gate = Gate(min_psnr_frame=20.0, min_metrics=("ssim=.9", "vmaf=80"), max_metrics=("lpips?=.1",)).with_margin(2.5)
    assert (gate.min_psnr, gate.min_psnr_worst, gate.min_psnr_frame) == (37.5, 30.5, 22.5)
    assert gate.min_metrics == ("ssim=0.925", "vmaf=82.5") and gate.max_metrics == ("lpips?=0.075",)


def test_bounds_must_be_finite():
    with pytest.raises(MetricError, match="min_psnr must be a finite number, got nan"):
        Gate(min_psnr=math.nan)


def test_the_result_is_json():
    found = Gate().check([POOR]).to_dict()
    assert found["passed"] is False and found["num_identical"] == 0
    assert found["failures"] == ["mean psnr 30.00 dB <= 35 dB", "pooled psnr 30.00 dB <= 35 dB"]
    assert found["conditions"][0] == {
        "name": "mean frame_cosine",
        "unit": "",
        "measured": 0.96,
        "bound": 0.95,
        "met": True,
        "is_maximum": False,
    }
