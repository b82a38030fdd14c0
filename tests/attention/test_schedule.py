import pytest

from sparsetune.attention.schedule import DenseSchedule, phase, step_of
from sparsetune.errors import ThresholdError


@pytest.mark.parametrize(
    ("fraction", "steps", "dense"), [(0.0, 50, 0), (0.1, 30, 3), (0.25, 10, 3), (1.0, 7, 7), (0.01, 10, 1)]
)
def test_dense_steps_are_the_fraction_rounded_up(fraction: float, steps: int, dense: int) -> None:
    schedule = DenseSchedule(fraction)
    assert schedule.num_dense_steps(steps) == dense
    assert [schedule.is_dense(step, steps) for step in range(steps)] == [step < dense for step in range(steps)]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ThresholdError, match=r"dense_fraction must be in \[0, 1\]"):
        DenseSchedule(fraction)


def test_factors_are_spread_over_the_steps_after_the_dense_ones() -> None:
    schedule = DenseSchedule(0.2, (1.0, 0.5, 0.0, 2.0))
    assert [schedule.scale(step, 10) for step in range(10)] == [0.0, 0.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 2.0, 2.0]
    assert [step for step in range(10) if schedule.is_dense(step, 10)] == [0, 1, 5, 6, 7]
    assert schedule.scale(None, 10) == 1.0
    assert [DenseSchedule().scale(step, 10) for step in range(10)] == [1.0] * 10


def test_every_phase_has_its_share_of_the_steps() -> None:
    assert [phase(step, 50, 10) for step in range(50)] == [step // 5 for step in range(50)]
    assert [phase(step, 3, 10) for step in range(3)] == [0, 3, 6]


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_a_factor_out_of_range_is_refused(factor: float) -> None:
    with pytest.raises(ThresholdError, match="drop_scale must be factors of at least 0"):
        DenseSchedule(0.0, (1.0, factor))


def test_a_step_is_found_by_its_timestep() -> None:
    timesteps = [999.0, 799.0, 599.0]
    assert [step_of(value, timesteps) for value in timesteps] == [0, 1, 2]
    assert step_of(799.4, timesteps) == 1  # half precision rounds timesteps
    assert step_of(700.0, timesteps) is None
    assert step_of(1.0, []) is None


def test_steps_that_low_precision_makes_alike_are_told_apart_by_the_schedulers_count() -> None:
    steps = [999.0, 998.2, 997.5, 500.0]
    rounding = 2.0**-7  # bfloat16's
    assert step_of(1000.0, steps, rounding) == 0
    assert step_of(1000.0, steps, rounding, step_index=2) == 2
    assert step_of(500.0, steps, rounding, step_index=2) == 3  # a count of another generation decides nothing
    assert step_of(999.4, steps) == 0
    assert step_of(1010.0, steps) is None


def test_last_steps_run_dense_in_whole_steps_beside_the_first_ones() -> None:
    ending = DenseSchedule(0.25, (1.0, 2.0)).ending_dense(0.1, 4)
    assert [ending.scale(step, 4) for step in range(4)] == [0.0, 1.0, 2.0, 0.0]
    assert [DenseSchedule().ending_dense(0.2, 30).is_dense(step, 30) for step in (23, 24, 29)] == [False, True, True]
    assert DenseSchedule(0.5).ending_dense(0.0, 4) == DenseSchedule(0.5)
