from pathlib import Path

import numpy as np
import pytest

from sparsetune.errors import TuningError
from sparsetune.tuning.curves import Curves, grid
from sparsetune.tuning.space import best_order

POINTS = grid(("cdf", "topk"))
LAYERS = (("transformer.blocks.0.attn", 2), ("transformer.blocks.1.attn", 3))


def curves(seed: int = 0, num_inputs: int = 1) -> Curves:
    """Random curves of two layers with two and three heads, two orders and three steps."""
    generator = np.random.default_rng(seed)
    shape = (2, 2, 3, 3, len(POINTS))
    error, sparsity = generator.random((2, *shape), dtype=np.float32)
    error[:, 0, :, 2], sparsity[:, 0, :, 2] = np.nan, np.nan  # the first layer has no third head
    return Curves(LAYERS, ("raster", "tiles"), (0, 5, 9), 10, POINTS, error, sparsity, num_inputs, True)


@pytest.mark.parametrize("rule", ["cdf", "topk"])
@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("dense_fraction", [0.0, 0.5])
def test_the_chosen_point_holds_the_bound_on_every_input_and_is_the_sparsest(rule, budget, dense_fraction) -> None:
    table = curves()
    policy = table.policy(budget, order="tiles", rule=rule, dense_fraction=dense_fraction)
    steps = [0, 1, 2] if dense_fraction == 0.0 else [1, 2]
    assert policy.order == "tiles"
    assert policy.schedule.dense_fraction == dense_fraction
    for index, layer in enumerate(policy.layers):
        for head, thresholds in enumerate(layer.heads):
            error = table.error[1, index, steps, head].max(0)
            sparsity = table.sparsity[1, index, steps, head].mean(0)
            allowed = [p for p, point in enumerate(POINTS) if point.rule == rule and error[p] <= budget]
            if not allowed:
                assert not thresholds.is_sparse
                continue
            chosen = POINTS.index(thresholds)
            assert chosen in allowed
            assert sparsity[chosen] == max(sparsity[p] for p in allowed)


def test_a_budget_that_no_point_meets_is_dense() -> None:
    policy = curves().policy(0.0)
    assert not any(head.is_sparse for layer in policy.layers for head in layer.heads)


def test_each_layer_may_have_its_own_budget() -> None:
    table = curves()
    mixed = table.policy([0.9, 0.2])
    assert mixed.layers[0] == table.policy(0.9).layers[0]
    assert mixed.layers[1] == table.policy(0.2).layers[1]
    with pytest.raises(TuningError, match="budgets must be one or 2"):
        table.policy([0.1, 0.2, 0.3])


def test_an_order_that_was_not_calibrated_is_refused() -> None:
    with pytest.raises(TuningError, match="one that was calibrated, raster, tiles, but is 'hilbert'"):
        curves().policy(0.5, order="hilbert")


def test_merging_keeps_the_largest_error_and_the_mean_sparsity() -> None:
    one, two = curves(1, num_inputs=1), curves(2, num_inputs=3)
    merged = one.merged(two)
    np.testing.assert_array_equal(merged.error, np.maximum(one.error, two.error))
    np.testing.assert_allclose(merged.sparsity, (one.sparsity + 3 * two.sparsity) / 4, rtol=1e-6)
    assert merged.num_inputs == 4
    for budget in (0.5, 0.9):  # a bound that holds on all inputs holds on each
        policy = merged.policy(budget)
        for index, layer in enumerate(policy.layers):
            for head, thresholds in enumerate(layer.heads):
                if thresholds.is_sparse:
                    assert one.error[0, index, :, head, POINTS.index(thresholds)].max() <= budget


def test_a_saved_table_is_read_back_whole(tmp_path: Path) -> None:
    table = curves()
    table.save(tmp_path / "calibration.npz")
    loaded = Curves.load(tmp_path / "calibration.npz")
    np.testing.assert_array_equal(loaded.error, table.error)
    np.testing.assert_array_equal(loaded.sparsity, table.sparsity)
    assert loaded.policy(0.5) == table.policy(0.5)
    assert (loaded.layers, loaded.steps, loaded.points) == (table.layers, table.steps, table.points)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    curves().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TuningError, match="must be a table that sparsetune wrote"):
        Curves.load(path)


def test_the_best_order_has_the_most_sparsity_at_the_same_error() -> None:
    table = curves()
    table.sparsity[1] *= 0.5
    assert best_order(table, ("raster", "tiles"), 0.9) == "raster"
    table.sparsity[0] *= 0.1
    assert best_order(table, ("raster", "tiles"), 0.9) == "tiles"
