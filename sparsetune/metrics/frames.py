"""Pixel-error metrics: cosine, PSNR, L1 and temporal difference between two videos.

All take the dense and the sparse frames, uint8 or uint16 (frames, height, width, 3), and are defined on values scaled
to [0, 1] (MAX = 1). Sums are exact integers; only the last division is floating point (float64). Frames are read in
parts that fit a processor's cache, so the extra memory is a few frames, whatever the video's length.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparsetune.metrics.registry import Frames, metric, pooled

PSNR_CAP_DB = 100.0
"""PSNR of identical videos, whose PSNR is infinite: a finite value, so that means stay finite."""

_PART = 1 << 16  # values: 2**16 products of at most 255² still fit a 32-bit sum, and all buffers a 1 MiB cache


class PixelErrors(NamedTuple):
    """Exact error sums of consecutive frames, on the scale of their integers."""

    squared: tuple[int, ...]  # per frame
    absolute: int  # over all
    frame_size: int  # values of a frame
    peak: int  # of a white pixel


def pixel_errors(dense: Frames, sparse: Frames) -> PixelErrors:
    """Sum squared and absolute errors in one pass over both videos."""
    squared, absolute = [], 0
    for d, s in zip(dense, sparse, strict=True):
        frame = 0
        for _, part_d, part_s in _parts(d, s):
            distance = np.maximum(part_d, part_s)  # |s - d|, unsigned: larger minus smaller can't wrap around
            distance -= np.minimum(part_d, part_s)
            wide = _wide(distance)
            absolute += _sum(wide)
            wide *= wide
            frame += _sum(wide)
        squared.append(frame)
    return PixelErrors(tuple(squared), absolute, dense[0].size, np.iinfo(dense.dtype).max)


def products(dense: Frames, sparse: Frames) -> tuple[int, int, int]:
    """Sum dense * sparse, dense * dense and sparse * sparse."""
    dot = norm_dense = norm_sparse = 0
    for d, s in zip(dense, sparse, strict=True):
        for _, part_d, part_s in _parts(d, s):
            wide_d, wide_s = _wide(part_d), _wide(part_s)
            dot += _sum(wide_d * wide_s)
            wide_d *= wide_d
            wide_s *= wide_s
            norm_dense += _sum(wide_d)
            norm_sparse += _sum(wide_s)
    return dot, norm_dense, norm_sparse


def motion_errors(dense: Frames, sparse: Frames) -> tuple[int, int]:
    """Sum |(s[t+1] - s[t]) - (d[t+1] - d[t])|, and return the largest that the sum can be, halved."""
    # It is the change of the error s - d, which for uint8 lies in [-510, 510].
    signed = np.int16 if dense.dtype == np.uint8 else np.int32
    total = 0
    previous = np.empty(dense[0].size, signed)
    for t, (d, s) in enumerate(zip(dense, sparse, strict=True)):
        for part, part_d, part_s in _parts(d, s):
            error = np.subtract(part_s, part_d, dtype=signed)
            if t > 0:
                total += int(np.abs(error - previous[part]).sum(dtype=np.int64))
            previous[part] = error
    return total, int(np.iinfo(dense.dtype).max) * previous.size * (len(dense) - 1)


@metric(
    range=(0.0, 1.0),
    higher_is_better=True,
    source="SpargeAttn-style accuracy tests",
)
@pooled(products)
def frame_cosine(sums: Sequence[tuple[int, int, int]]) -> float:
    """Cosine similarity of the two whole videos, each flattened into one vector.

    The cosine of a zero vector is undefined: two all-black videos count as 1, one against any other video as 0.
    """
    dot, norm_dense, norm_sparse = (sum(column) for column in zip(*sums, strict=True))
    if norm_dense == 0 or norm_sparse == 0:
        return 1.0 if norm_dense == norm_sparse else 0.0
    cosine: float = dot / math.sqrt(norm_dense * norm_sparse)
    return min(1.0, cosine)


@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    source="the usual definition, pooled over the video, unlike psnr_frame_mean",
)
@pooled(pixel_errors)
def psnr(errors: Sequence[PixelErrors]) -> float:
    """Peak signal-to-noise ratio 10·log10(1 / MSE), MSE over the whole video, capped at 100 dB."""
    return _psnr(sum(sum(one.squared) for one in errors), _num_values(errors), errors[0].peak)


@metric(
    range=(0.0, 1.0),
    higher_is_better=False,
    source="SpargeAttn-style accuracy tests",
)
@pooled(pixel_errors)
def frame_l1(errors: Sequence[PixelErrors]) -> float:
    """Mean |sparse - dense| over all values."""
    return sum(one.absolute for one in errors) / (errors[0].peak * _num_values(errors))


@metric(
    range=(0.0, 2.0),
    higher_is_better=False,
    source="SpargeAttn-style accuracy tests",
)
@pooled(motion_errors, overlap=True)
def frame_diff(sums: Sequence[tuple[int, int]]) -> float:
    """Mean |(s[t+1] - s[t]) - (d[t+1] - d[t])|, what changed in the motion; 0 for a single frame."""
    total, largest = (sum(column) for column in zip(*sums, strict=True))
    return total / largest if largest else 0.0


@pooled(pixel_errors)
def psnr_per_frame(errors: Sequence[PixelErrors]) -> tuple[float, ...]:
    """PSNR in dB of every frame by itself, each capped at 100."""
    return tuple(_psnr(squared, one.frame_size, one.peak) for one in errors for squared in one.squared)


@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    source="Sparse-VideoGen reports PSNR this way",
)
@pooled(pixel_errors)
def psnr_frame_mean(errors: Sequence[PixelErrors]) -> float:
    """Mean over the frames that differ of each frame's PSNR; 100 dB where none differs.

    Identical frames are left out: at the cap of 100 dB each, few of them would carry the mean. It is never below the
    `psnr` of the same frames, which pools their errors (Jensen).
    """
    values = [value for value in psnr_per_frame.pool(errors) if value < PSNR_CAP_DB]
    return math.fsum(values) / len(values) if values else PSNR_CAP_DB


@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    source="sparsetune",
)
@pooled(pixel_errors)
def psnr_frame_min(errors: Sequence[PixelErrors]) -> float:
    """PSNR of the worst frame, capped at 100 dB."""
    return min(psnr_per_frame.pool(errors))


def pooled_psnr(values: Sequence[float]) -> float:
    """PSNR in dB of the mean squared error of several videos of one size, from the PSNR of each.

    It is what `psnr` would give for the videos joined into one, and so never above the mean of the values.
    """
    errors = [0.0 if value >= PSNR_CAP_DB else 10.0 ** (-value / 10.0) for value in values]
    mean = math.fsum(errors) / len(errors)
    return PSNR_CAP_DB if mean == 0.0 else min(PSNR_CAP_DB, -10.0 * math.log10(mean))


def _parts(dense: Frames, sparse: Frames) -> Iterator[tuple[slice, Frames, Frames]]:
    d, s = dense.reshape(-1), sparse.reshape(-1)  # copies a frame that isn't contiguous
    for start in range(0, d.size, _PART):
        part = slice(start, start + _PART)
        yield part, d[part], s[part]


def _wide(values: Frames) -> Frames:
    """Widen so that a product of two values fits."""
    return values.astype(np.uint16 if values.dtype == np.uint8 else np.uint32)


def _sum(wide: Frames) -> int:
    return int(wide.sum(dtype=np.uint32 if wide.dtype == np.uint16 else np.uint64))


def _num_values(errors: Sequence[PixelErrors]) -> int:
    return sum(len(one.squared) * one.frame_size for one in errors)


def _psnr(squared_error: int, count: int, peak: int) -> float:
    if squared_error == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10.0 * math.log10(peak * peak * count / squared_error))
