"""Pairs of thresholds for all heads alike, from calibrated curves."""

from dataclasses import replace

import numpy as np
import pytest

from sparsetune.tuning.calibration.uniform_pairs import uniform_pairs
from tests.tuning.tables import POINTS, smooth


def test_the_pairs_are_of_the_simthreshd1_with_the_lower_error_and_in_order_of_sparsity() -> None:
    curves = smooth()
    worse = np.array([2.0 if point.simthreshd1 == -1.0 else 1.0 for point in POINTS], np.float32)
    pairs = uniform_pairs(replace(curves, error_rms=curves.error_rms * worse), True, 0.5)
    assert {pair.simthreshd1 for pair in pairs} == {0.3}
    assert [pair.sparsity for pair in pairs] == sorted(pair.sparsity for pair in pairs)
    for pair in pairs[1:]:
        assert pair.sparsity == pytest.approx(1 + np.log(max(1 - pair.cdfthreshd, 1e-3)) / np.log(1e3), abs=1e-3)


def test_without_the_raster_order_there_are_none() -> None:
    assert uniform_pairs(smooth(), False, 0.5) == ()
