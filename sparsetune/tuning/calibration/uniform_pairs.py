"""Pairs of thresholds for all heads alike, from calibrated curves: what a user without a tuner would set."""

import numpy as np

from sparsetune.evaluation.hand_set import Pair
from sparsetune.tuning.calibration.curves import Arrangement, Curves

_MAX_ERROR = 1e3  # in place of an unbounded one


def uniform_pairs(curves: Curves, keep_text: bool, sparsity: float) -> tuple[Pair, ...]:
    """Pairs of the simthreshd1 that has the lower calibrated error at a sparsity, in order of sparsity.

    Empty where the curves have no raster order, in which SpargeAttn runs.
    """
    raster = Arrangement("raster", keep_text)
    if raster not in curves.arrangements:
        return ()
    place = curves.arrangements.index(raster)
    saved = np.nanmean(curves.sparsity[place], axis=(0, 1, 2))
    error = np.sqrt(np.nanmean(np.minimum(curves.error_rms[place], _MAX_ERROR).astype(np.float64) ** 2, axis=(0, 1, 2)))
    families: dict[float, list[tuple[float, float, float]]] = {}
    for index, point in enumerate(curves.points):
        if point.cdfthreshd is not None:
            families.setdefault(point.simthreshd1, []).append(
                (point.cdfthreshd, float(saved[index]), float(error[index]))
            )

    def error_at(simthreshd1: float) -> float:
        _, saved, error = zip(*sorted(families[simthreshd1], key=lambda row: row[1]), strict=True)
        return float(np.interp(sparsity, saved, error, right=np.inf))

    best = min(families, key=error_at)
    rows = sorted(families[best], key=lambda row: row[1])
    return tuple(Pair(best, cdf, saved) for cdf, saved, _ in rows)
