"""The candidate table of each head, bit for bit equal to an explicit sum over all steps."""

import numpy as np
import pytest

from sparsetune.attention.schedule import DenseSchedule, phase
from sparsetune.attention.thresholds import Rule
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity, head_shares
from sparsetune.tuning.search.allocation import allocate, predict
from sparsetune.tuning.search.candidates import CandidateTable, Floats, _shift
from tests.tuning.tables import curves

SENSITIVITIES = (
    Sensitivity(),
    Sensitivity(phases=tuple(np.geomspace(0.05, 20.0, 4)), groups=(3.0, 1 / 3)),
)


def written_out(
    table: Curves, sensitivity: Sensitivity, rule: Rule, schedule: DenseSchedule, weights: tuple[float, ...]
) -> tuple[Floats, Floats, float]:
    """Cost, gain and unit of both orders, computed step by step without a cache."""
    usable = [index for index, point in enumerate(table.points) if point.rule == rule]
    points = tuple(table.points[index] for index in usable)
    of_layer = sensitivity.of_layers(2) * np.array([weights[phase(index, 2, len(weights))] for index in range(2)])
    cost, gain, unit = np.zeros((2, 2, 3, len(usable))), np.zeros((2, 2, 3, len(usable))), 0.0
    for step in range(table.num_steps):
        sensitive = of_layer * sensitivity.phases[phase(step, table.num_steps, len(sensitivity.phases))]
        place = min(range(len(table.steps)), key=lambda place: abs(table.steps[place] - step))
        power = sensitive[:, None] * head_shares(table)[:, place] ** 2
        unit += float(power.sum())
        if factor := schedule.scale(step, table.num_steps):
            error = np.nan_to_num(table.error_rms[[0, 1], :, place][..., usable].astype(np.float64), posinf=1e3)
            sparsity = np.nan_to_num(table.sparsity[[0, 1], :, place][..., usable].astype(np.float64))
            cost += power[..., None] * (error @ _shift(points, factor)) ** 2
            gain += sparsity @ _shift(points, factor) / table.num_steps
    return cost, gain, unit


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("rule", ["cdf", "topk"])
def test_offers_are_the_same_to_the_last_bit_whatever_was_asked_before(sensitivity: Sensitivity, rule: Rule) -> None:
    table = curves(2)
    table.error_rms[1, 1, 0, 0, 5] = np.inf
    candidates = CandidateTable(table, sensitivity)
    for dense_fraction, steepness, weights in ((0.2, 0.5, (1.0, 1.7)), (0.0, 0.0, (1.0,)), (0.2, 0.5, (1.0, 0.6))):
        schedule = sensitivity.schedule(dense_fraction, steepness)
        found = candidates.costs((0, 1), rule, schedule, weights)
        cost, gain, unit = written_out(table, sensitivity, rule, schedule, weights)
        assert np.array_equal(found.cost, cost) and np.array_equal(found.gain, gain) and found.unit == unit


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("rule", ["cdf", "topk"])
def test_a_prediction_adds_up_what_each_head_takes_to_the_last_bit(sensitivity: Sensitivity, rule: Rule) -> None:
    table = curves(3)
    candidates = CandidateTable(table, sensitivity)
    for budget, orders in ((0.1, None), (0.3, ("tiles",)), (1e-9, ("raster",))):
        policy = allocate(candidates, budget, orders=orders, rule=rule, dense_fraction=0.2)
        cost, _, unit = written_out(table, sensitivity, rule, policy.schedule, (1.0,))
        points = [point for point in table.points if point.rule == rule]
        spent = 0.0
        for index, layer in enumerate(policy.layers):
            for head, thresholds in enumerate(layer.heads):
                order = ("raster", "tiles").index(policy.head_orders[index][head])
                spent += float(cost[order, index, head, points.index(thresholds)]) if thresholds.is_sparse else 0.0
        assert predict(candidates, policy) == float(np.sqrt(spent / unit))
