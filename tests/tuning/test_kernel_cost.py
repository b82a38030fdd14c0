"""Allocation where a sparse call costs more than its pairs: layers, steps and token orders must earn their cost."""

from dataclasses import replace

import numpy as np
import pytest

from sparsetune.attention.policy import Policy
from sparsetune.attention.schedule import DenseSchedule
from sparsetune.bench.step_time import StepSeconds
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.search.allocation import (
    KernelCost,
    allocate,
    only_paying_layers,
    only_paying_steps,
    predict_seconds,
    predicted_sparsity,
)
from sparsetune.tuning.search.candidates import CandidateTable
from tests.tuning.tables import curves, smooth

STEP = StepSeconds(rest=0.02, dense=0.008, overhead=0.004, pairs=0.006, order=0.0006, num_layers=2)


def candidates(seed: int = 3) -> CandidateTable:
    return CandidateTable(curves(seed), Sensitivity())


def net(table: CandidateTable, policy: Policy, kernel: KernelCost) -> float:
    """Sparsity of all layers and steps beyond what the kernel and its orders cost."""
    sparsity = predicted_sparsity(table, policy)
    assert sparsity is not None
    needed = np.array([
        (kernel.break_even + kernel.order * any(order != "raster" for order in orders)) if layer.is_sparse else 0.0
        for layer, orders in zip(policy.layers, policy.sparse_orders, strict=True)
    ])  # fmt: skip
    num_steps = len(sparsity)
    return sum(
        float((of_layer - needed).sum())
        for step, of_layer in enumerate(sparsity)
        if not policy.schedule.is_dense(step, num_steps)
    )


def test_without_a_cost_the_allocation_is_as_before() -> None:
    for seed in range(4):
        assert allocate(candidates(seed), 0.1) == allocate(candidates(seed), 0.1, kernel=KernelCost())


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("kernel", [KernelCost(0.2), KernelCost(0.1, 0.1), KernelCost(0.0, 0.3)])
def test_it_saves_at_least_as_much_as_an_allocation_that_ignores_the_cost(budget: float, kernel: KernelCost) -> None:
    for seed in range(5):
        table = candidates(seed)
        aware = allocate(table, budget, steepness=0.0, kernel=kernel)
        ignorant = allocate(table, budget, steepness=0.0)
        assert net(table, aware, kernel) >= net(table, ignorant, kernel) - 1e-9
        assert net(table, aware, kernel) >= -1e-9


def test_a_kernel_that_never_pays_leaves_everything_dense() -> None:
    assert not any(layer.is_sparse for layer in allocate(candidates(), 0.1, kernel=KernelCost(1.5)).layers)


def test_an_order_that_costs_too_much_is_not_taken() -> None:
    dear = allocate(candidates(), 0.1, kernel=KernelCost(0.0, 2.0))
    assert {order for of_layer in dear.sparse_orders for order in of_layer} <= {"raster"}
    free = allocate(candidates(), 0.1, kernel=KernelCost(0.0, 1e-9))
    assert "tiles" in {order for of_layer in free.sparse_orders for order in of_layer}


def test_steps_that_drop_too_little_run_dense() -> None:
    table = CandidateTable(smooth(), Sensitivity())
    policy = allocate(table, 0.2, orders=("raster",), steepness=0.0)
    uneven = replace(policy, schedule=DenseSchedule(0.0, (1.0, 1.0, 0.02, 1.0, 0.02)))
    sparsity = predicted_sparsity(table, uneven)
    assert sparsity is not None
    levels = sorted({round(float(of_layer.mean()), 6) for of_layer in sparsity})
    kept = only_paying_steps(table, uneven, KernelCost((levels[0] + levels[-1]) / 2)).schedule
    num_steps = table.curves.num_steps
    assert [kept.is_dense(step, num_steps) for step in range(num_steps)] == [
        uneven.schedule.scale(step, num_steps) == 0.02 for step in range(num_steps)
    ]
    assert only_paying_steps(table, uneven, KernelCost()) == uneven


def test_seconds_are_the_steps_less_what_each_layer_saves() -> None:
    table = CandidateTable(smooth(), Sensitivity())
    policy = allocate(table, 0.2, orders=("raster",), steepness=0.0)
    sparsity = predicted_sparsity(table, policy)
    assert sparsity is not None and len(policy.layers) == STEP.num_layers
    saved = sum(STEP.saved(float(each)) for of_layer in sparsity for each in of_layer)
    assert predict_seconds(table, policy, STEP) == pytest.approx(len(sparsity) * STEP.step - saved)
    dense = replace(policy, schedule=DenseSchedule(1.0))
    assert predict_seconds(table, dense, STEP) == pytest.approx(len(sparsity) * STEP.step)
    assert predict_seconds(table, Policy.uniform(table.curves.layers), STEP) is None


def test_layers_of_a_bounded_policy_that_cost_more_than_they_save_run_dense() -> None:
    table = CandidateTable(smooth(), Sensitivity())
    policy = allocate(table, 0.2, orders=("raster",), steepness=0.0)
    assert only_paying_layers(table, policy, KernelCost(0.01)) == policy
    assert not any(layer.is_sparse for layer in only_paying_layers(table, policy, KernelCost(0.99)).layers)
