"""Policies within an error bound, compared with an exhaustive search of the table."""

from dataclasses import replace

import numpy as np
import pytest

from sparsetune.errors import TuningError
from sparsetune.tuning.calibration.bounded_policy import Bounds, bounded_policy, starting_policy
from tests.tuning.tables import POINTS, curves, smooth


@pytest.mark.parametrize("rule", ["cdf", "topk"])
@pytest.mark.parametrize("bound", [0.3, 0.6, 0.9])
def test_the_chosen_point_holds_the_bound_on_every_input_and_is_the_sparsest(rule, bound) -> None:
    table = curves()
    policy = bounded_policy(table, bound, orders=("tiles",), rule=rule)
    assert policy.order == "tiles" and policy.select_partial and policy.keep_text
    assert policy.schedule.dense_fraction == 0.0
    for index, layer in enumerate(policy.layers):
        for head, thresholds in enumerate(layer.heads):
            error = table.error[1, index, :, head].max(0)
            sparsity = table.sparsity[1, index, :, head].mean(0)
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


def test_each_head_takes_the_order_that_gives_it_the_most() -> None:
    table = curves()
    table.sparsity[0, 0] *= 0.1
    table.sparsity[1, 1] *= 0.1
    policy = bounded_policy(table, 0.9)
    assert policy.orders == ("tiles", "raster")
    assert bounded_policy(table, 0.9, orders=("tiles",)).orders == ("tiles", "tiles")
    table.sparsity[1, 0, :, 0] *= 0.01
    assert bounded_policy(table, 0.9).orders == (("raster", "tiles"), "raster")


def test_dense_heads_and_layers_need_no_order_of_their_own() -> None:
    table = curves()
    table.error[1, 0, :, 0] = table.error[:, 1] = np.inf  # the first head of the first layer is dense in tiles
    table.error[0, 0] = np.inf  # and nothing else runs in raster
    policy = bounded_policy(table, 0.9)
    assert [[head.is_sparse for head in layer.heads] for layer in policy.layers] == [[False, True], [False] * 3]
    assert policy.order == "tiles" and [layer.order for layer in policy.layers] == [None, None]


def test_an_order_that_was_not_calibrated_is_refused() -> None:
    with pytest.raises(TuningError, match=r"calibrated ones \(raster, tiles with keep_text True\), got hilbert"):
        bounded_policy(curves(), 0.5, orders=("hilbert",))
    with pytest.raises(TuningError, match=r"calibrated ones \(none with keep_text False\)"):
        bounded_policy(curves(), 0.5, keep_text=False)


def test_a_start_fixes_the_similarity_and_order_with_the_most_sparsity_at_the_bound() -> None:
    table = smooth()
    error, sparsity = table.error.copy(), table.sparsity.copy()
    places = [place for place, point in enumerate(POINTS) if point.rule == "cdf" and point.simthreshd1 == 0.3]
    sparsity[:, 0, :, 1][..., places] *= 1.01  # one head of the first layer does better with 0.3
    sparsity[0, 1] *= 0.9  # and the second layer in tiles
    start = starting_policy(replace(table, error=error, sparsity=sparsity), 0.05)
    first, second = start.layers
    assert [head.simthreshd1 for head in first.heads] == [-1.0, 0.3]
    assert start.orders == ("raster", "tiles") and start.keep_text
    assert all(head.is_sparse and head.simthreshd1 == -1.0 for head in second.heads)


def test_between_two_points_a_start_weighs_what_lies_at_the_bound() -> None:
    table = smooth()
    error, sparsity = table.error.copy(), table.sparsity.copy()
    family = {sim: [place for place, point in enumerate(POINTS) if point.simthreshd1 == sim and point.rule == "cdf"]
              for sim in (-1.0, 0.3)}  # fmt: skip
    bound = 0.05
    within = next(place for place in family[-1.0] if error[0, 0, 0, 0, place] <= bound)
    # With 0.3 the first point within the bound is a little sparser, but the next, just beyond it, much less so.
    sparsity[..., family[0.3]] -= 0.05
    sparsity[..., family[0.3][family[-1.0].index(within)]] = sparsity[..., within] + 0.001
    policy = replace(table, error=error, sparsity=sparsity)
    assert bounded_policy(policy, bound).layers[0].heads[0].simthreshd1 == 0.3
    assert starting_policy(policy, bound).layers[0].heads[0].simthreshd1 == -1.0


def test_a_head_that_no_point_keeps_within_the_bound_starts_at_its_most_exact_one() -> None:
    table = smooth()
    error = table.error.copy()
    error[:, 0, :, 0] += 0.5
    start = starting_policy(replace(table, error=error), 0.05)
    densest = max(point.cdfthreshd for point in POINTS if point.rule == "cdf")
    assert start.layers[0].heads[0].cdfthreshd == densest and start.layers[0].heads[0].is_sparse
    assert start.layers[0].heads[1].cdfthreshd < densest


def test_a_start_of_the_topk_rule_has_its_points() -> None:
    start = starting_policy(smooth(), 0.5, rule="topk", orders=("tiles",))
    assert start.order == "tiles" and {layer.rule for layer in start.layers} == {"topk"}


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(TuningError, match=r"pv_l1 must exceed l1 \(0.06\), got 0.05; raise --pv-l1"):
        Bounds(0.06, 0.05)
