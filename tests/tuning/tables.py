"""Calibrated curves of two small layers, for tests of code that uses them."""

import numpy as np

from sparsetune.tuning.calibration.curves import Arrangement, Curves, grid

POINTS = grid(("cdf", "topk"))
LAYERS = (("transformer.blocks.0.attn", 2), ("transformer.blocks.1.attn", 3))
ARRANGEMENTS = (Arrangement("raster", True), Arrangement("tiles", True))


def curves(seed: int = 0, num_inputs: int = 1) -> Curves:
    """Random curves: two orders, two layers with two and three heads, three of ten steps."""
    generator = np.random.default_rng(seed)
    shape = (2, 2, 3, 3, len(POINTS))
    error, sparsity = generator.random((2, *shape), dtype=np.float32)
    size = generator.random((2, 3, 3), dtype=np.float32) + 0.1
    error[:, 0, :, 2], sparsity[:, 0, :, 2], size[0, :, 2] = np.nan, np.nan, np.nan  # the first layer has two heads
    return Curves(LAYERS, ARRANGEMENTS, (0, 5, 9), 10, POINTS, error, error, sparsity, size, num_inputs, True)


def smooth(steps: tuple[int, ...] = tuple(range(10))) -> Curves:
    """Realistic curves: error is the dropped share, sparsity its logarithm; the same for all heads."""
    dropped = np.array([1.0 - (point.cdfthreshd if point.rule == "cdf" else point.topk) for point in POINTS])
    error = np.broadcast_to(dropped, (2, 2, len(steps), 3, len(POINTS))).astype(np.float32).copy()
    sparsity = (1.0 + np.log(np.maximum(error, 1e-3)) / np.log(1e3)).astype(np.float32)
    size = np.ones((2, len(steps), 3), np.float32)
    return Curves(LAYERS, ARRANGEMENTS, steps, 10, POINTS, error, error, sparsity, size, 1, True)
