"""How often intervals cover, differences are called significant, and candidates pass: simulated, and shown in docs.

`WRITE_DOCS=1 pytest -m slow tests/metrics/test_operating_characteristics.py` writes the tables into the page.
"""

import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsetune.config.models import PromotionConfig
from sparsetune.metrics import holm, inferiority, mean_interval, paired_difference

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "budgets-and-metrics.md"
MARGINS = PromotionConfig()
MARGIN_SPEED = -math.log1p(-MARGINS.margin_speed)

DISTRIBUTIONS: dict[str, tuple[Callable[[np.random.Generator, int], Any], float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "heavy tails (t with 3 degrees of freedom)": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    "moderately skewed (lognormal, deviation 0.5)": (lambda rng, n: rng.lognormal(0.0, 0.5, size=n), math.exp(0.125)),
    "strongly skewed (lognormal, deviation 1)": (lambda rng, n: rng.lognormal(0.0, 1.0, size=n), math.exp(0.5)),
    "1 prompt in 10 is 8 deviations lower": (lambda rng, n: rng.normal(size=n) - 8.0 * (rng.random(n) < 0.1), -0.8),
}


@functools.cache
def coverage(kind: str, n: int, repetitions: int = 10_000) -> float:
    draw, mean = DISTRIBUTIONS[kind]
    rng = np.random.default_rng(n)
    intervals = (mean_interval(draw(rng, n)) for _ in range(repetitions))
    return sum(low <= mean <= high for low, high in intervals) / repetitions


@functools.cache
def false_alarms(metrics: int, correlation: float, n: int) -> float:
    """Share of comparisons of equal results in which any of the metrics is called different."""
    rng, repetitions, alarms = np.random.default_rng(n), 10_000 if metrics == 1 else 4_000, 0
    shared, own = math.sqrt(correlation), math.sqrt(1.0 - correlation)
    for _ in range(repetitions):
        differences = shared * rng.normal(size=n) + own * rng.normal(size=(metrics, n))
        p_values = holm([paired_difference(np.zeros(n), one).p_value for one in differences])
        alarms += any(p < 0.05 for p in p_values if p is not None)
    return alarms / repetitions


@functools.cache
def outcomes(
    loss: float, std: float, n: int, margin: float, worst: float, repetitions: int = 4_000
) -> dict[str, float]:
    """Shares of a candidate's outcomes whose true loss is `loss`."""
    rng, found = np.random.default_rng(n), {"no worse": 0, "worse": 0, "unclear": 0}
    for _ in range(repetitions):
        test = inferiority(rng.normal(-loss, std, size=n), margin, typical_std=std)
        found["worse" if test.worst <= -worst else test.verdict] += 1
    return {verdict: count / repetitions for verdict, count in found.items()}


def lost_by_a_row_of_candidates(n: int, with_first: bool, chains: int = 300) -> float:
    """Mean loss in dB after twenty candidates, each truly 0.4 dB below its champion; differences deviate by 0.2 dB."""
    rng, lost, std = np.random.default_rng(n), 0.0, 0.2 / math.sqrt(2)
    for _ in range(chains):
        first = champion = rng.normal(0.0, std, size=n)
        quality = 0.0
        for _ in range(20):
            candidate = rng.normal(quality - 0.4, std, size=n)
            tests = [champion, first] if with_first else [champion]
            if all(inferiority(candidate - one, 0.5, typical_std=1.0).verdict == "no worse" for one in tests):
                champion, quality = candidate, quality - 0.4
        lost -= quality
    return lost / chains


PROMPTS = (2, 4, 6, 8, 16, 32)
COMPARED = (4, 6, 8, 16)
PAIRS = (4, 6, 8, 16, 27, 54)
TIMED = (1, 2, 3, 4, 8, 16)
LOSSES = (-0.5, 0.0, 0.25, 0.5, 1.0)
SLOWER = (-0.02, 0.0, 0.02, 0.05)


def quality(loss: float, n: int, std: float = 1.0) -> dict[str, float]:
    return outcomes(loss, std, n, MARGINS.margin_db, MARGINS.margin_worst_db)


def speed(slower: float, n: int) -> dict[str, float]:
    return outcomes(-math.log1p(-slower), 0.02, n, MARGIN_SPEED, math.inf)


def shares(found: dict[str, float]) -> str:
    return f"{found['no worse']:.0%} / {found['unclear']:.0%}"


def table(head: str, columns: tuple[int, ...], rows: dict[str, list[str]]) -> str:
    lines = [f"| {head} | {' | '.join(map(str, columns))} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def tables() -> dict[str, str]:
    covers = {kind: [f"{coverage(kind, n):.1%}" for n in PROMPTS] for kind in DISTRIBUTIONS}
    kinds = {"one metric": (1, 0.0), "ten independent, corrected": (10, 0.0), "ten that correlate by .9": (10, 0.9)}
    alarms = {name: [f"{false_alarms(*kind, n):.1%}" for n in COMPARED] for name, kind in kinds.items()}
    passed = {f"{0.0 - loss:+g} dB": [shares(quality(loss, n)) for n in PAIRS] for loss in LOSSES}
    timed = {f"{0.0 - slower:+.0%}": [shares(speed(slower, n)) for n in TIMED] for slower in SLOWER}
    return {
        "coverage": table("values of the prompts", PROMPTS, covers),
        "alarms": table("metrics", COMPARED, alarms),
        "quality": table("true change", PAIRS, passed),
        "speed": table("true change", TIMED, timed),
    }


def on_page() -> dict[str, str]:
    found = re.finditer(r"<!-- simulated: (\w+) -->\n(.*?)\n\n", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return {match[1]: match[2] for match in found}


@pytest.mark.parametrize("n", PROMPTS)
@pytest.mark.parametrize("kind", list(DISTRIBUTIONS)[:2])
def test_a_95_percent_interval_covers_93_to_97_percent_from_two_prompts_on(kind: str, n: int) -> None:
    assert 0.93 <= coverage(kind, n) <= 0.97


@pytest.mark.parametrize("n", [6, 8, 16])
def test_equal_results_differ_significantly_in_5_percent(n: int) -> None:
    assert false_alarms(1, 0.0, n) == pytest.approx(0.05, abs=0.01)
    assert false_alarms(10, 0.0, n) == pytest.approx(0.05, abs=0.01)
    assert false_alarms(10, 0.9, n) <= 0.06


@pytest.mark.parametrize("n", PAIRS)
def test_a_candidate_that_loses_the_margin_passes_in_at_most_5_percent(n: int) -> None:
    assert quality(0.5, n)["no worse"] <= 0.06
    assert quality(1.0, n)["no worse"] <= 0.01
    assert quality(0.0, n)["worse"] <= 0.1  # mostly by its worst prompt, where there are many


def test_the_number_that_is_asked_for_lets_an_equal_candidate_pass_in_80_percent() -> None:
    assert quality(0.0, 27)["no worse"] == pytest.approx(0.8, abs=0.05)
    assert quality(0.0, 8, std=0.5)["no worse"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("n", TIMED)
def test_a_candidate_that_is_slower_by_the_margin_passes_in_at_most_5_percent(n: int) -> None:
    assert speed(0.02, n)["no worse"] <= 0.06
    assert speed(0.05, n)["no worse"] <= 0.01
    assert n > 1 or speed(0.0, n)["unclear"] == 1.0


def test_a_row_of_candidates_does_not_drift_away_from_the_first() -> None:
    drifting, held = (lost_by_a_row_of_candidates(16, with_first) for with_first in (False, True))
    assert held < 0.5 < drifting
    text = f"lost {drifting:.2f} dB on average against the champion alone, and {held:.2f} dB against the first one too"
    assert os.environ.get("WRITE_DOCS") or text in " ".join(PAGE.read_text(encoding="utf-8").split()), text


def test_the_page_shows_what_was_simulated() -> None:
    simulated = tables()
    if os.environ.get("WRITE_DOCS"):
        page = PAGE.read_text(encoding="utf-8")
        for name, text in simulated.items():
            page = re.sub(rf"(<!-- simulated: {name} -->\n).*?(\n\n)", lambda m: m[1] + text + m[2], page, flags=re.S)  # noqa: B023
        PAGE.write_text(page, encoding="utf-8")
    assert on_page() == simulated
