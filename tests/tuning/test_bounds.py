"""Policies within an error bound, against a search through the whole table."""

from dataclasses import replace

import numpy as np
import pytest

from sparsetune.errors import TuningError
from sparsetune.tuning.bounds import bounded_policy
from sparsetune.tuning.curves import grid
from tests.tuning.tables import POINTS, curves


@pytest.mark.parametrize("rule", ["cdf", "topk"])
@pytest.mark.parametrize("bound", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("dense_fraction", [0.0, 0.5])
def test_the_chosen_point_holds_the_bound_on_every_input_and_is_the_sparsest(rule, bound, dense_fraction) -> None:
    table = curves()
    policy = bounded_policy(table, bound, orders=("tiles",), rule=rule, dense_fraction=dense_fraction)
    steps = [0, 1, 2] if dense_fraction == 0.0 else [1, 2]
    assert policy.order == "tiles" and policy.select_partial and policy.keep_text
    assert policy.schedule.dense_fraction == dense_fraction
    for index, layer in enumerate(policy.layers):
        for head, thresholds in enumerate(layer.heads):
            error = table.error[1, index, steps, head].max(0)
            sparsity = table.sparsity[1, index, steps, head].mean(0)
            allowed = [p for p, point in enumerate(POINTS) if point.rule == rule and error[p] <= bound]
            if not allowed:
                assert not thresholds.is_sparse
                continue
            chosen = POINTS.index(thresholds)
            assert chosen in allowed
            assert sparsity[chosen] == max(sparsity[p] for p in allowed)


def test_a_bound_that_no_point_meets_is_dense() -> None:
    policy = bounded_policy(curves(), 0.0)
    assert not any(head.is_sparse for layer in policy.layers for head in layer.heads)


def test_each_layer_takes_the_order_that_gives_it_the_most() -> None:
    table = curves()
    table.sparsity[0, 0] *= 0.1
    table.sparsity[1, 1] *= 0.1
    policy = bounded_policy(table, 0.9)
    assert policy.orders == ("tiles", "raster")
    assert bounded_policy(table, 0.9, orders=("tiles",)).orders == ("tiles", "tiles")


def test_an_order_that_was_not_calibrated_is_refused() -> None:
    with pytest.raises(TuningError, match=r"calibrated ones \(raster, tiles with keep_text True\), but are hilbert"):
        bounded_policy(curves(), 0.5, orders=("hilbert",))
    with pytest.raises(TuningError, match=r"calibrated ones \(none with keep_text False\)"):
        bounded_policy(curves(), 0.5, keep_text=False)


def test_the_lowest_pvthreshd_within_the_second_bound_is_taken() -> None:
    table = curves()
    points = grid(("cdf", "topk"), skip_pv=True)
    more = len(points) // len(POINTS)
    error = np.concatenate([table.error + 0.01 * number for number in range(more)], axis=-1)
    whole = replace(table, points=points, error=error, sparsity=np.concatenate([table.sparsity] * more, axis=-1))
    # Off, 7, 5, 3.5, 2.5, 1.75 and 1 cost 0.01 more each: 0.035 above the bound leaves room for three of them.
    policy = bounded_policy(whole, 0.5, 0.5001)
    plain = bounded_policy(whole, 0.5)
    for layer, before in zip(policy.layers, plain.layers, strict=True):
        for head, same in zip(layer.heads, before.heads, strict=True):
            assert replace(head, pvthreshd=same.pvthreshd) == same
            if head.is_sparse:
                index = whole.points.index(head)
                place = whole.arrangements.index((policy.layers[0].order or policy.order, True))
                assert whole.error[place].shape[-1] > index
    assert any(head.pvthreshd < 50 for layer in policy.layers for head in layer.heads)


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(TuningError, match=r"pv_l1 must exceed l1, .* but they are 0.05 and 0.06; raise --pv-l1"):
        bounded_policy(curves(), 0.06, 0.05)
