"""The pinned metrics: pixel errors between two videos.

All take the dense and the sparse frames, uint8 (frames, height, width, 3), and are defined on values scaled
to [0, 1] (MAX = 1). The sums are integers, so they are exact: nothing wraps around and no rounding builds up.
Only the last division is floating point (float64). Videos are walked in slabs that fit a processor's cache,
so the extra memory is a few frames, whatever the video's length.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sparsetune.metrics.registry import Frames, check_pair, metric

PSNR_CAP_DB = 100.0
"""PSNR of identical videos, which have none: a finite figure that means can be taken over (as peers do)."""

_SLAB = 1 << 15
"""Values a slab: 2**15 products of at most 255² still fit a 32-bit sum (exact), and all buffers a 512 KiB cache."""

_MAX_SQUARED = 255 * 255


@metric(
    unit="",
    range=(0.0, 1.0),
    higher_is_better=True,
    definition="cosine similarity of the two whole videos as one vector each",
    source="SpargeAttn-style accuracy tests",
)
def frame_cosine(dense: Frames, sparse: Frames) -> float:
    """Cosine similarity of the two whole videos, each flattened into one vector; in [0, 1].

    The cosine of a zero vector is undefined: two all-black videos count as 1.0 (they are the same), one
    all-black video against any other as 0.0.
    """
    check_pair(dense, sparse)
    dot = norm_dense = norm_sparse = 0
    for d, s in _slabs(dense, sparse):
        wide_d, wide_s = d.astype(np.uint16), s.astype(np.uint16)
        dot += _sum(wide_d * wide_s)
        norm_dense += _sum(wide_d * wide_d)
        norm_sparse += _sum(wide_s * wide_s)
    if norm_dense == 0 or norm_sparse == 0:
        return 1.0 if norm_dense == norm_sparse else 0.0
    cosine = dot / math.sqrt(norm_dense * norm_sparse)
    return min(1.0, cosine)


@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    definition="10·log10(1 / MSE), MSE over the whole video, capped at 100 dB",
    source="the usual definition, pooled over the video, unlike psnr_frame_mean",
)
def psnr(dense: Frames, sparse: Frames) -> float:
    """Peak signal-to-noise ratio in dB with the MSE pooled over the whole video; identical videos are 100."""
    return _psnr(sum(_squared_errors(dense, sparse)), dense.size)


@metric(
    unit="",
    range=(0.0, 1.0),
    higher_is_better=False,
    definition="mean |sparse - dense| over all values",
    source="SpargeAttn-style accuracy tests",
)
def frame_l1(dense: Frames, sparse: Frames) -> float:
    """Mean absolute difference over all values, in [0, 1]."""
    check_pair(dense, sparse)
    return sum(_sum(_distance(d, s)) for d, s in _slabs(dense, sparse)) / (255 * dense.size)


@metric(
    unit="",
    range=(0.0, 2.0),
    higher_is_better=False,
    definition="mean |(s[t+1] - s[t]) - (d[t+1] - d[t])|, what changed in the motion; 0 for a single frame",
    source="SpargeAttn-style accuracy tests",
)
def frame_diff(dense: Frames, sparse: Frames) -> float:
    """Mean absolute difference of the frame-to-frame changes, in [0, 2].

    A single frame has no motion in which anything could have changed, so its value is 0.0 (not NaN, which no
    mean or JSON file survives).
    """
    check_pair(dense, sparse)
    if len(dense) == 1:
        return 0.0
    # (s[t+1] - s[t]) - (d[t+1] - d[t]) is the change of the error s - d, which lies in [-510, 510].
    total = 0
    before = np.subtract(sparse[0], dense[0], dtype=np.int16)
    for d, s in zip(dense[1:], sparse[1:], strict=True):
        error = np.subtract(s, d, dtype=np.int16)
        total += int(np.abs(error - before).sum(dtype=np.int64))
        before = error
    changes = dense.size // len(dense) * (len(dense) - 1)
    return total / (255 * changes)


def psnr_per_frame(dense: Frames, sparse: Frames) -> tuple[float, ...]:
    """PSNR in dB of every frame by itself, each capped at 100."""
    return tuple(_psnr(error, dense[0].size) for error in _squared_errors(dense, sparse))


@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    definition="mean over the frames of each frame's PSNR, capped at 100 dB each",
    source="Sparse-VideoGen reports PSNR this way",
)
def psnr_frame_mean(dense: Frames, sparse: Frames) -> float:
    """Mean over the frames of each frame's PSNR in dB; never below the pooled `psnr` (Jensen), short of the cap."""
    values = psnr_per_frame(dense, sparse)
    return math.fsum(values) / len(values)


@metric(
    unit="dB",
    range=(0.0, PSNR_CAP_DB),
    higher_is_better=True,
    definition="PSNR of the worst frame, capped at 100 dB",
    source="sparsetune",
)
def psnr_frame_min(dense: Frames, sparse: Frames) -> float:
    """PSNR in dB of the worst frame."""
    return min(psnr_per_frame(dense, sparse))


def _slabs(dense: Frames, sparse: Frames) -> Iterator[tuple[Frames, Frames]]:
    for d, s in zip(dense, sparse, strict=True):
        flat_d, flat_s = d.reshape(-1), s.reshape(-1)  # copies one frame where a view of frames isn't contiguous
        for start in range(0, flat_d.size, _SLAB):
            yield flat_d[start : start + _SLAB], flat_s[start : start + _SLAB]


def _distance(d: Frames, s: Frames) -> Frames:
    # |s - d| that stays in uint8: the larger minus the smaller can't wrap around.
    return np.maximum(d, s) - np.minimum(d, s)


def _squared_errors(dense: Frames, sparse: Frames) -> Iterator[int]:
    check_pair(dense, sparse)
    for d, s in zip(dense, sparse, strict=True):
        total = 0
        for slab_d, slab_s in _slabs(d[np.newaxis], s[np.newaxis]):
            distance = _distance(slab_d, slab_s).astype(np.uint16)
            total += _sum(distance * distance)  # 255² fits 16 bits
        yield total


def _sum(values: npt.NDArray[np.unsignedinteger]) -> int:
    return int(values.sum(dtype=np.uint32))


def _psnr(squared_error: int, count: int) -> float:
    if squared_error == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10.0 * math.log10(_MAX_SQUARED * count / squared_error))
