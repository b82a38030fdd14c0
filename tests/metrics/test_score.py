import math

import pytest

from sparsetune.errors import MetricError
from sparsetune.metrics import score, score_prompts, verdict


def test_the_worked_example():
    assert score(0.985, 37.82, 0.0457) == 85
    assert verdict(85) == "good"


def test_identical_videos_score_100():
    assert score(1.0, 100.0, 0.0) == 100
    assert verdict(100) == "excellent"
    assert score_prompts([{"frame_cosine": 1.0, "psnr": 100.0, "frame_l1": 0.0}] * 2) == 100


@pytest.mark.parametrize("psnr", [60.0, 99.9, 100.0])
def test_one_lucky_prompt_does_not_carry_the_score(psnr):
    lossy = [{"frame_cosine": 0.99, "psnr": 29.75, "frame_l1": 0.03}] * 5
    assert score_prompts(lossy) == 55
    # pooled, a prompt without any error lifts the other five by 0.8 dB, here over the step at 30 dB
    assert score_prompts([*lossy, {"frame_cosine": 1.0, "psnr": psnr, "frame_l1": 0.0}]) == (75 if psnr < 100 else 55)


@pytest.mark.parametrize(
    ("cosine", "points"), [(0.9801, 40), (0.98, 30), (0.9501, 30), (0.95, 20), (0.9001, 20), (0.90, 0), (0.0, 0)]
)
def test_cosine_points(cosine, points):
    assert score(cosine, 0.0, 1.0) == points


@pytest.mark.parametrize(
    ("psnr", "points"), [(40.01, 40), (40.0, 30), (35.01, 30), (35.0, 20), (30.01, 20), (30.0, 0), (7.0, 0)]
)
def test_psnr_points(psnr, points):
    assert score(0.0, psnr, 1.0) == points


@pytest.mark.parametrize(
    ("l1", "points"), [(0.0199, 20), (0.02, 15), (0.0499, 15), (0.05, 10), (0.0999, 10), (0.10, 0), (0.5, 0)]
)
def test_l1_points(l1, points):
    assert score(0.0, 0.0, l1) == points


@pytest.mark.parametrize(
    ("points", "word"),
    [
        (95, "excellent"),
        (94, "good"),
        (80, "good"),
        (79, "acceptable"),
        (60, "acceptable"),
        (59, "degraded"),
        (0, "degraded"),
    ],
)
def test_verdicts(points, word):
    assert verdict(points) == word


def test_nan_has_no_score():
    with pytest.raises(MetricError, match="psnr is NaN"):
        score(0.9, math.nan, 0.1)


def test_a_score_outside_its_range_has_no_verdict():
    with pytest.raises(MetricError, match=r"in \[0, 100\], got 101"):
        verdict(101)
