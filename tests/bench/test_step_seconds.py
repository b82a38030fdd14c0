"""What a step costs, from times with known lines; and what follows for a policy."""

from dataclasses import replace

import pytest

from sparsetune.bench.step_time import StepSeconds, StepTime, StepTimes


def row(name: str, ms: float, sparsity: float = 0.0) -> StepTime:
    return StepTime(name, ms, ms, ms, None, sparsity)


# 10 layers; in each, dense attention takes 8 ms, sparse 2 + 6 (1 - sparsity) ms, token orders 0.5 ms; the rest 20 ms.
TIMES = StepTimes(
    dense=row("dense", 100.0),
    sparse=tuple(row("sparse", 20 + 10 * (2 + 6 * (1 - s)), s) for s in (0.3, 0.6, 0.85)),
    ordered=row("token orders", 20 + 10 * (2.5 + 6 * 0.7), 0.3),
    without=row("without", 20.0),
    after=row("after", 100.0),
    fallbacks={},
    num_layers=10,
)
STEP = StepSeconds.of(TIMES)


def test_the_line_is_found_exactly() -> None:
    assert STEP.rest == pytest.approx(0.020)
    assert STEP.dense == pytest.approx(0.008)
    assert STEP.overhead == pytest.approx(0.002)
    assert STEP.pairs == pytest.approx(0.006)
    assert STEP.order == pytest.approx(0.0005)
    assert STEP.step == pytest.approx(0.1)


def test_share_and_ceiling_are_those_of_the_times() -> None:
    assert STEP.attention_share == pytest.approx(TIMES.attention_share)
    assert STEP.ceiling == pytest.approx(TIMES.ceiling)


def test_a_layer_saves_nothing_at_the_break_even() -> None:
    slow = replace(STEP, overhead=0.005)  # 5 + 6 (1 - s) = 8 at s = 1/2
    assert slow.break_even == pytest.approx(0.5)
    assert slow.saved(0.5) == pytest.approx(0.0)
    assert slow.saved(0.75) == pytest.approx(0.0015)
    assert slow.saved(0.75, ordered=True) == pytest.approx(0.001)
    assert slow.saved(0.25) < 0


def test_a_kernel_that_is_faster_even_without_sparsity_breaks_even_at_none() -> None:
    assert replace(STEP, overhead=0.001).break_even == 0.0


def test_a_step_that_is_slower_without_attention_spends_nothing_on_it() -> None:
    sparse = tuple(row("sparse", 150.0 - s, s) for s in (0.3, 0.6, 0.85))
    step = StepSeconds.of(replace(TIMES, sparse=sparse, without=row("without", 104.0)))
    assert (step.dense, step.rest, step.attention_share, step.ceiling) == (0.0, pytest.approx(0.1), 0.0, 1.0)
    assert step.saved(1.0) < 0


def test_token_orders_that_were_measured_faster_by_noise_cost_nothing() -> None:
    assert TIMES.ordered is not None
    assert StepSeconds.of(replace(TIMES, ordered=replace(TIMES.ordered, ms=50.0))).order == 0.0
    assert StepSeconds.of(replace(TIMES, ordered=None)).order == 0.0
