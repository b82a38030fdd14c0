"""SSIM and MS-SSIM of two videos.

Definition: Wang et al. 2004, an 11 × 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population (not sample)
covariances, only windows that lie wholly inside the frame; on each RGB channel by itself, data_range 1 (the full range
of the integers); averaged over channels and windows of a frame, then over frames. scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)` computes the
same.

Computed from the sum p and the difference m of the two frames (both linear, so their windows' means mu and variances v
give those of the frames): luminance is (mu_p² - mu_m² + 2·C1) / (mu_p² + mu_m² + 2·C1), contrast and structure
(v_p - v_m + 2·C2) / (v_p + v_m + 2·C2). Filters run in float32 with p centred at 0, which keeps the error against
float64 below 1e-5 and makes identical frames exactly 1; sums are taken in float64. A filter is a product with a band
matrix of the window, tile by tile: numpy's BLAS does that as fast as a convolution in PyTorch, and starts in no time.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsetune.metrics.registry import Frames, check_min_side, metric, pooled

WINDOW = 11  # side of the Gaussian window in pixels: smaller frames have no SSIM
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the scales, finest first, fitted to viewers
MS_SSIM_MIN_SIDE = WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)  # 176: the coarsest scale must still hold one window

_SIGMA = 1.5
_CENTRE = np.float32(255)  # of the sum: variances don't change when values are shifted, but cancel far less in float32
_C1 = np.float32(2 * (0.01 * 255) ** 2)
_C2 = np.float32(2 * (0.03 * 255) ** 2)
_TILE = 32  # windows: a tile then needs 42 rows or columns, and what it needs stays in the processor's caches

Plane = npt.NDArray[np.float32]
Scales = tuple[tuple[float, float], ...]
"""Mean SSIM and mean contrast-structure term of a frame by scale, finest first; only the first where it is small."""


class Similarity(NamedTuple):
    """Height and width of the frames in pixels, and what was measured of each."""

    size: tuple[int, int]
    frames: list[Scales]


def similarity(dense: Frames, sparse: Frames) -> Similarity:
    """Measure every frame at MS-SSIM's five scales, or at its own alone where the coarsest would hold no window.

    Scales are 2 × 2 means without an odd last row or column.
    """
    size = dense.shape[1], dense.shape[2]
    check_min_side("ssim", size, WINDOW)
    num_scales = len(MS_SSIM_WEIGHTS) if min(size) >= MS_SSIM_MIN_SIDE else 1
    return Similarity(size, [_scales(d, s, num_scales) for d, s in zip(dense, sparse, strict=True)])


@metric(
    range=(-1.0, 1.0),
    higher_is_better=True,
    source="Wang et al. 2004, doi:10.1109/TIP.2003.819861",
)
@pooled(similarity)
def ssim(slabs: Sequence[Similarity]) -> float:
    """SSIM, 11×11 Gaussian window of sigma 1.5, per RGB channel; mean over channels, windows and frames.

    Identical videos are exactly 1. MetricUnavailable: a side is under 11 pixels, so no window fits.
    """
    values = [scales[0][0] for slab in slabs for scales in slab.frames]
    return math.fsum(values) / len(values)


@metric(
    range=(0.0, 1.0),
    higher_is_better=True,
    source="Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216",
)
@pooled(similarity)
def ms_ssim(slabs: Sequence[Similarity]) -> float:
    """MS-SSIM over five scales of SSIM's window; per frame from channel means, then the mean over frames.

    Per frame: the contrast-structure term of the four finer scales and the whole SSIM of the coarsest one, each
    averaged over channels and windows, to the power of its weight, multiplied. A negative term counts as 0, as with
    torchmetrics' `normalize="relu"`; the paper doesn't say. MetricUnavailable: a side is under 176 pixels, so the
    coarsest scale holds no window.
    """
    check_min_side("ms_ssim", slabs[0].size, MS_SSIM_MIN_SIDE)
    values = [_multi_scale(scales) for slab in slabs for scales in slab.frames]
    return math.fsum(values) / len(values)


def _multi_scale(scales: Scales) -> float:
    terms = [*(contrast for _, contrast in scales[:-1]), scales[-1][0]]
    product: float = math.prod(max(0.0, term) ** weight for term, weight in zip(terms, MS_SSIM_WEIGHTS, strict=True))
    return product


def _scales(dense: Frames, sparse: Frames, num_scales: int) -> Scales:
    """Measure one frame (height, width, 3)."""
    means = np.zeros((num_scales, 2))
    for channel in range(3):
        d, s = (np.ascontiguousarray(frame[..., channel], np.float32) for frame in (dense, sparse))
        if dense.dtype != np.uint8:
            d, s = d * np.float32(255 / 65535), s * np.float32(255 / 65535)
        total, difference = d + s - _CENTRE, d - s
        for scale in range(num_scales):
            if scale > 0:
                total, difference = _halve(total), _halve(difference)
            means[scale] += _similarity(total, difference)
    return tuple((float(whole), float(contrast)) for whole, contrast in means / 3)


def _similarity(total: Plane, difference: Plane) -> npt.NDArray[np.float64]:
    """Mean SSIM and mean contrast-structure term over all windows of a plane."""
    rows, columns = total.shape[0] - WINDOW + 1, total.shape[1] - WINDOW + 1
    sums: npt.NDArray[np.float64] = np.zeros(2)
    for start in range(0, rows, _TILE):
        band = slice(start, min(start + _TILE, rows) + WINDOW - 1)
        maps = np.stack((total[band], difference[band], total[band], difference[band]))
        maps[2:] *= maps[:2]
        sums += _terms(*_blur(maps))
    sums /= rows * columns
    return sums


def _terms(mean_p: Plane, mean_m: Plane, squares_p: Plane, squares_m: Plane) -> tuple[float, float]:
    """Sum both terms over the windows; overwrites its arguments."""
    squares_p -= mean_p * mean_p
    mean_m *= mean_m
    squares_m -= mean_m
    contrast = squares_p - squares_m
    contrast += _C2
    squares_p += squares_m
    squares_p += _C2
    contrast /= squares_p
    mean_p += _CENTRE
    mean_p *= mean_p
    whole = mean_p - mean_m
    whole += _C1
    mean_p += mean_m
    mean_p += _C1
    whole /= mean_p
    whole *= contrast
    return float(whole.sum(dtype=np.float64)), float(contrast.sum(dtype=np.float64))


def _blur(maps: Plane) -> Plane:
    """Filter (maps, rows + 10, columns + 10) with the window where it fits: (maps, rows, columns)."""
    num_maps, height, width = maps.shape
    rows, columns = height - WINDOW + 1, width - WINDOW + 1
    tall = np.matmul(_window()[:rows, :height], maps)
    blurred = np.empty((num_maps, rows, columns), np.float32)
    for start in range(0, columns, _TILE):
        count = min(_TILE, columns - start)
        window = _window()[:count, : count + WINDOW - 1].T
        np.matmul(tall[:, :, start : start + count + WINDOW - 1], window, out=blurred[:, :, start : start + count])
    return blurred


@functools.cache
def _window() -> Plane:
    """Band matrix (tile, tile + 10) of the window: row i has it from column i on."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    matrix = np.zeros((_TILE, _TILE + WINDOW - 1), np.float32)
    for row in range(_TILE):
        matrix[row, row : row + WINDOW] = window / window.sum()
    return matrix


def _halve(plane: Plane) -> Plane:
    height, width = (side // 2 * 2 for side in plane.shape)
    quarters = [plane[y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)]
    mean: Plane = (quarters[0] + quarters[1] + quarters[2] + quarters[3]) * np.float32(0.25)
    return mean
