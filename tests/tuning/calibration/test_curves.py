"""The table of calibrated curves: merged, saved and read back."""

from pathlib import Path

import numpy as np
import pytest

from sparsetune.errors import TuningError
from sparsetune.tuning.calibration.curves import Curves, grid
from tests.tuning.tables import curves


def test_merging_keeps_the_largest_error_and_the_mean_sparsity() -> None:
    one, two = curves(1, num_inputs=1), curves(2, num_inputs=3)
    merged = one.merged(two)
    np.testing.assert_array_equal(merged.error, np.maximum(one.error, two.error))
    np.testing.assert_allclose(merged.error_rms**2, (one.error**2 + 3 * two.error**2) / 4, rtol=1e-5)
    np.testing.assert_allclose(merged.sparsity, (one.sparsity + 3 * two.sparsity) / 4, rtol=1e-6)
    np.testing.assert_allclose(merged.size, (one.size + 3 * two.size) / 4, rtol=1e-6)
    assert merged.num_inputs == 4


def test_curves_of_another_grid_dont_merge() -> None:
    other = curves()
    object.__setattr__(other, "points", grid(("cdf",)))
    with pytest.raises(TuningError, match="cannot merge curves that differ in points"):
        curves().merged(other)


def test_a_saved_table_is_read_back_whole(tmp_path: Path) -> None:
    table = curves()
    table.save(tmp_path / "calibration.npz")
    loaded = Curves.load(tmp_path / "calibration.npz")
    for name in ("error", "error_rms", "sparsity", "size"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))
    for name in ("layers", "arrangements", "steps", "num_steps", "points", "num_inputs", "select_partial"):
        assert getattr(loaded, name) == getattr(table, name)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    curves().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TuningError, match=r"cannot read the calibration .*; remove it to calibrate again"):
        Curves.load(path)


def test_each_point_of_the_grid_leaves_out_less_than_the_last() -> None:
    cdfs = [point.cdfthreshd for point in grid(("cdf",)) if point.simthreshd1 == -1.0]
    assert cdfs == sorted(cdfs) and cdfs[0] == 0.0 and cdfs[-1] > 0.999
