"""Allocation with one Lagrange multiplier, against the optimality conditions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import LayerThresholds
from sparsetune.tuning.calibration.bounded_policy import DENSE
from sparsetune.tuning.calibration.curves import Arrangement, Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.search.allocation import KernelCost, allocate, best_order, predict, predicted_sparsity
from sparsetune.tuning.search.candidates import CandidateTable
from tests.tuning.tables import LAYERS, POINTS, curves, smooth


def shares(policy: Policy) -> list[float]:
    return [1.0 - head.cdfthreshd for layer in policy.layers for head in layer.heads]


def sparsity_of(table: Curves, policy: Policy) -> float:
    """Mean over heads and sampled steps, of a policy without a schedule."""
    found = []
    for index, layer in enumerate(policy.layers):
        for head, (order, thresholds) in enumerate(zip(policy.head_orders[index], layer.heads, strict=True)):
            place = ("raster", "tiles").index(order)
            of_steps = (
                table.sparsity[place, index, :, head, POINTS.index(thresholds)] if thresholds.is_sparse else [0.0]
            )
            found.append(float(np.mean(of_steps)))
    return float(np.mean(found))


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.3])
def test_the_whole_error_is_within_the_budget(budget: float) -> None:
    for table in (smooth(), curves()):
        policy = allocate(CandidateTable(table, Sensitivity()), budget, steepness=0.0)
        error = predict(CandidateTable(table, Sensitivity()), policy)
        assert error is not None and error <= budget * (1 + 1e-9)
    assert (
        predict(CandidateTable(smooth(), Sensitivity()), allocate(CandidateTable(smooth(), Sensitivity()), budget))
        > 0.6 * budget
    )


def test_heads_alike_get_alike_and_a_larger_budget_gets_more() -> None:
    tight, loose = (allocate(CandidateTable(smooth(), Sensitivity()), budget, steepness=0.0) for budget in (0.02, 0.2))
    assert len(set(shares(tight))) == len(set(shares(loose))) == 1
    assert shares(tight)[0] < shares(loose)[0]


def test_no_other_choice_within_the_error_is_sparser() -> None:
    """Exhaustive search over one order's few points: none beats the Lagrangian allocation at its error."""
    table = curves(3)
    few = [index for index, point in enumerate(POINTS) if point.rule == "topk"][:4]
    table = replace(
        table, layers=(LAYERS[0],), points=tuple(POINTS[index] for index in few),
        error_rms=table.error[:, :1, ..., few], sparsity=table.sparsity[:, :1, ..., few], size=table.size[:1],
    )  # fmt: skip
    policy = allocate(CandidateTable(table, Sensitivity()), 0.4, orders=("raster",), rule="topk", steepness=0.0)
    place = {point: index for index, point in enumerate(table.points)}

    def figures(choice: tuple[int, ...]) -> tuple[float, float]:
        steps = [min(range(3), key=lambda index: abs(table.steps[index] - step)) for step in range(10)]
        size = table.size[0, :, :2] / table.size[0, :, :2].sum(-1, keepdims=True)
        error = sum(size[s, h] ** 2 * table.error[0, 0, s, h, c] ** 2
                    for s in steps for h, c in enumerate(choice) if c >= 0)  # fmt: skip
        return float(error), float(sum(table.sparsity[0, 0, s, h, c] for s in steps for h, c in enumerate(choice)
                                       if c >= 0))  # fmt: skip

    taken = tuple(place[head] if head.is_sparse else -1 for head in policy.layers[0].heads)
    error, sparsity = figures(taken)
    for choice in itertools.product(range(-1, len(few)), repeat=2):
        other_error, other_sparsity = figures(choice)
        assert other_error > error * (1 - 1e-6) or other_sparsity <= sparsity * (1 + 1e-6), choice


def test_a_sensitive_step_drops_less_and_a_dense_one_nothing() -> None:
    sensitivity = Sensitivity(phases=tuple(np.geomspace(0.01, 100.0, 10)))
    policy = allocate(CandidateTable(smooth(), sensitivity), 0.05, steepness=0.5, dense_fraction=0.2)
    scale = [policy.schedule.scale(step, 10) for step in range(10)]
    assert scale[:2] == [0.0, 0.0]
    assert scale[2:] == sorted(scale[2:], reverse=True) and scale[2] > scale[-1]


def test_layers_that_weigh_more_drop_less() -> None:
    policy = allocate(CandidateTable(smooth(), Sensitivity(groups=(4.0, 0.25))), 0.05)
    assert shares(policy)[0] < shares(policy)[-1]
    weighed = allocate(CandidateTable(smooth(), Sensitivity()), 0.05, weights=(1.0, 0.1))
    assert shares(weighed)[0] < shares(weighed)[-1]


def test_each_head_takes_the_order_that_is_worth_most() -> None:
    table = smooth()
    table.sparsity[0, 0] *= 0.5
    table.sparsity[1, 1] *= 0.5
    assert allocate(CandidateTable(table, Sensitivity()), 0.05).orders == ("tiles", "raster")
    table.sparsity[1, 0, :, 1] *= 0.25
    policy = allocate(CandidateTable(table, Sensitivity()), 0.05)
    assert policy.orders == (("tiles", "raster"), "raster")
    alone = [allocate(CandidateTable(table, Sensitivity()), 0.05, orders=(order,)) for order in ("raster", "tiles")]
    error = predict(CandidateTable(table, Sensitivity()), policy)
    assert error is not None and error <= 0.05 * (1 + 1e-9)
    assert all(sparsity_of(table, policy) > sparsity_of(table, other) for other in alone)
    table.sparsity[0] *= 0.5
    assert best_order(table, ("raster", "tiles"), True) == "tiles"


def test_a_dense_layer_is_predicted_whatever_order_stands_there() -> None:
    table = smooth()
    candidates = CandidateTable(
        replace(table, arrangements=(Arrangement("hilbert", True), Arrangement("tiles", True))), Sensitivity()
    )
    policy = allocate(candidates, 0.1, steepness=0.0)
    first, second = policy.layers
    dense = replace(second, heads=(DENSE["cdf"],) * len(second.heads), order="raster")
    apart = replace(policy, layers=(replace(first, order="tiles"), dense))
    error = predict(candidates, apart)
    assert error is not None and 0.0 < error < 0.1


def test_thresholds_that_were_not_calibrated_have_no_prediction() -> None:
    assert predict(CandidateTable(smooth(), Sensitivity()), Policy.uniform(LAYERS)) is None
    odd = Policy.uniform(LAYERS, order="raster", keep_text=True, select_partial=True)
    assert predict(CandidateTable(smooth(), Sensitivity()), odd) is None


def test_what_a_step_drops_twice_as_much_of_is_read_off_the_curve() -> None:
    table = smooth()
    point = next(p for p in POINTS if p.cdfthreshd == 0.5 and p.simthreshd1 == -1.0)
    double = next(p for p in POINTS if p.cdfthreshd == 0.75 and p.simthreshd1 == -1.0)
    one = Policy.uniform(table.layers, point, keep_text=True, select_partial=True)
    from sparsetune.attention.schedule import DenseSchedule

    two = Policy.uniform(table.layers, double, keep_text=True, select_partial=True, schedule=DenseSchedule(0.0, (2.0,)))
    assert predict(CandidateTable(table, Sensitivity()), one) == pytest.approx(
        predict(CandidateTable(table, Sensitivity()), two), rel=1e-6
    )


@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0])
def test_one_threshold_for_the_sparse_layers_is_the_best_of_all_such_policies(budget: float) -> None:
    for seed in range(4):
        table = CandidateTable(curves(seed), Sensitivity())
        shared = allocate(table, budget, rule="topk", orders=["raster"], steepness=0.0, sharing="sparse_layers")
        error, found = predict(table, shared), sparsity_of(table.curves, shared)
        assert error is not None and error <= budget
        assert len({head for layer in shared.layers for head in layer.heads if head.is_sparse}) <= 1
        for point, chosen in itertools.product(
            (point for point in POINTS if point.rule == "topk"), itertools.product((False, True), repeat=len(LAYERS))
        ):
            layers = tuple(
                LayerThresholds.uniform(name, heads, point if on else DENSE["topk"])
                for (name, heads), on in zip(LAYERS, chosen, strict=True)
            )
            other = replace(shared, layers=layers)
            if (predict(table, other) or 0.0) <= budget:
                assert sparsity_of(table.curves, other) <= found / 0.98 + 1e-9


def test_one_threshold_for_all_layers_leaves_none_dense_and_is_within_a_limit() -> None:
    table = CandidateTable(smooth(), Sensitivity())
    policy = allocate(table, 0.3, rule="topk", orders=["raster"], steepness=0.0, dense_last=0.2, sharing="all_layers")
    (head,) = {head for layer in policy.layers for head in layer.heads}
    assert head.is_sparse and 0.6 < head.topk < 0.8  # the error is what is dropped
    assert [policy.schedule.is_dense(step, 10) for step in range(10)] == [False] * 8 + [True] * 2
    limited = allocate(table, sparsity=0.85, rule="topk", orders=["raster"], steepness=0.0, sharing="all_layers")
    assert sparsity_of(table.curves, limited) == pytest.approx(2 / 3)  # of topk .9, in the table's six heads
    assert allocate(table, 1e-6, rule="topk", orders=["raster"], steepness=0.0, sharing="all_layers").is_dense


def test_one_threshold_runs_dense_the_layers_in_which_it_costs_more_than_it_saves() -> None:
    table = CandidateTable(curves(1), Sensitivity())
    kernel = KernelCost(break_even=0.55)
    policy = allocate(table, 1.0, rule="topk", orders=["raster"], steepness=0.0, kernel=kernel, sharing="sparse_layers")
    by_step = predicted_sparsity(table, policy)
    for index, layer in enumerate(policy.layers):
        assert not layer.is_sparse or np.mean([of_layers[index] for of_layers in by_step]) > 0.55
    assert any(layer.is_sparse for layer in policy.layers)
