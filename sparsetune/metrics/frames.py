"""Pixel-error metrics: cosine, PSNR, L1 and temporal difference between two videos.

All take the dense and the sparse frames, uint8 (frames, height, width, 3), and are defined on values scaled to [0, 1]
(MAX = 1). Sums are exact integers; only the last division is floating point (float64). Videos are read in slabs that
fit a processor's cache, so the extra memory is a few frames, whatever the video's length.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsetune.metrics.registry import Frames, checked, metric

PSNR_CAP_DB = 100.0
"""PSNR of identical videos, whose PSNR is infinite: a finite value, so that means stay finite."""

_SLAB = 1 << 16  # values: 2**16 products of at most 255² still fit a 32-bit sum, and all buffers a 1 MiB cache
_MAX_SQUARED = 255 * 255


class PixelErrors(NamedTuple):
    """Exact error sums of a pair of videos on the uint8 scale."""

    squared: tuple[int, ...]  # per frame
    absolute: int  # over the video


def pixel_errors(dense: Frames, sparse: Frames) -> PixelErrors:
    """Sum squared and absolute errors in one pass over both videos."""
    squared, absolute = [], 0
    for d, s in zip(dense, sparse, strict=True):
        frame = 0
        for _, slab_d, slab_s in _slabs(d, s):
            distance = np.maximum(slab_d, slab_s)  # |s - d| in uint8: larger minus smaller can't wrap around
            distance -= np.minimum(slab_d, slab_s)
            wide = distance.astype(np.uint16)
            absolute += _sum(wide)
            wide *= wide  # 255² fits 16 bits
            frame += _sum(wide)
        squared.append(frame)
    return PixelErrors(tuple(squared), absolute)


@checked
@metric(
    range=(0.0, 1.0),
    higher_is_better=True,
    source="SpargeAttn-style accuracy tests",
)
def frame_cosine(dense: Frames, sparse: Frames) -> float:
    """Cosine similarity of the two whole videos, each flattened into one vector.

    The cosine of a zero vector is undefined: two all-black videos count as 1, one against any other video as 0.
    """
    dot = norm_dense = norm_sparse = 0
    for d, s in zip(dense, sparse, strict=True):
        for _, slab_d, slab_s in _slabs(d, s):
            wide_d, wide_s = slab_d.astype(np.uint16), slab_s.astype(np.uint16)
            dot += _sum(wide_d * wide_s)
            wide_d *= wide_d
            wide_s *= wide_s
            norm_dense += _sum(wide_d)
            norm_sparse += _sum(wide_s)
    if norm_dense == 0 or norm_sparse == 0:
        return 1.0 if norm_dense == norm_sparse else 0.0
    return min(1.0, dot / math.sqrt(norm_dense * norm_sparse))


@checked
@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    source="the usual definition, pooled over the video, unlike psnr_frame_mean",
    prepare=pixel_errors,
)
def psnr(dense: Frames, sparse: Frames, errors: PixelErrors | None = None) -> float:
    """Peak signal-to-noise ratio 10·log10(1 / MSE), MSE over the whole video, capped at 100 dB."""
    return _psnr(sum((errors or pixel_errors(dense, sparse)).squared), dense.size)


@checked
@metric(
    range=(0.0, 1.0),
    higher_is_better=False,
    source="SpargeAttn-style accuracy tests",
    prepare=pixel_errors,
)
def frame_l1(dense: Frames, sparse: Frames, errors: PixelErrors | None = None) -> float:
    """Mean |sparse - dense| over all values."""
    return (errors or pixel_errors(dense, sparse)).absolute / (255 * dense.size)


@checked
@metric(
    range=(0.0, 2.0),
    higher_is_better=False,
    source="SpargeAttn-style accuracy tests",
)
def frame_diff(dense: Frames, sparse: Frames) -> float:
    """Mean |(s[t+1] - s[t]) - (d[t+1] - d[t])|, what changed in the motion; 0 for a single frame."""
    if len(dense) == 1:
        return 0.0
    # This is the change of the error s - d, and lies in [-510, 510].
    total = 0
    previous = np.empty(dense[0].size, np.int16)
    for t, (d, s) in enumerate(zip(dense, sparse, strict=True)):
        for part, slab_d, slab_s in _slabs(d, s):
            error = np.subtract(slab_s, slab_d, dtype=np.int16)
            if t > 0:
                total += int(np.abs(error - previous[part]).sum(dtype=np.int32))
            previous[part] = error
    return total / (255 * previous.size * (len(dense) - 1))


@checked
def psnr_per_frame(dense: Frames, sparse: Frames, errors: PixelErrors | None = None) -> tuple[float, ...]:
    """PSNR in dB of every frame by itself, each capped at 100."""
    return tuple(_psnr(error, dense[0].size) for error in (errors or pixel_errors(dense, sparse)).squared)


@checked
@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    source="Sparse-VideoGen reports PSNR this way",
    prepare=pixel_errors,
)
def psnr_frame_mean(dense: Frames, sparse: Frames, errors: PixelErrors | None = None) -> float:
    """Mean over the frames that differ of each frame's PSNR; 100 dB where none differs.

    Identical frames are left out: at the cap of 100 dB each, few of them would carry the mean. It is never below the
    `psnr` of the same frames, which pools their errors (Jensen).
    """
    values = [value for value in psnr_per_frame(dense, sparse, errors) if value < PSNR_CAP_DB]
    return math.fsum(values) / len(values) if values else PSNR_CAP_DB


@checked
@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    source="sparsetune",
    prepare=pixel_errors,
)
def psnr_frame_min(dense: Frames, sparse: Frames, errors: PixelErrors | None = None) -> float:
    """PSNR of the worst frame, capped at 100 dB."""
    return min(psnr_per_frame(dense, sparse, errors))


def pooled_psnr(values: Sequence[float]) -> float:
    """PSNR in dB of the mean squared error of several videos of one size, from the PSNR of each.

    It is what `psnr` would give for the videos joined into one, and so never above the mean of the values.
    """
    errors = [0.0 if value >= PSNR_CAP_DB else 10.0 ** (-value / 10.0) for value in values]
    mean = math.fsum(errors) / len(errors)
    return PSNR_CAP_DB if mean == 0.0 else min(PSNR_CAP_DB, -10.0 * math.log10(mean))


def _slabs(dense: Frames, sparse: Frames) -> Iterator[tuple[slice, Frames, Frames]]:
    d, s = dense.reshape(-1), sparse.reshape(-1)  # copies a frame that isn't contiguous
    for start in range(0, d.size, _SLAB):
        part = slice(start, start + _SLAB)
        yield part, d[part], s[part]


def _sum(values: npt.NDArray[np.uint16]) -> int:
    return int(values.sum(dtype=np.uint32))


def _psnr(squared_error: int, count: int) -> float:
    if squared_error == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10.0 * math.log10(_MAX_SQUARED * count / squared_error))
