"""VMAF and XPSNR, computed by the ffmpeg binary of imageio-ffmpeg.

Of two files they are what ffmpeg gives: of the luma that the files hold, without a conversion. Of frames they are those
of 8-bit BT.709 (limited range, 4:4:4): frames are piped as raw RGB, each dense frame with the sparse one under it, and
cropped apart again, since one pipe can't deadlock.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from sparsetune import ffmpeg
from sparsetune.decoding import VideoFile
from sparsetune.errors import MetricError
from sparsetune.files import scratch_folder
from sparsetune.metrics.registry import Frames, MetricUnavailable, check_min_side, checked, metric

VMAF_MODEL = "vmaf_v0.6.1"  # the default, built into libvmaf; trained for viewing 1080p at three picture heights
VMAF_MIN_SIDE = 32  # libvmaf halves frames four times and crashes on some that are smaller
XPSNR_CAP_DB = 100.0  # of identical videos, whose XPSNR is infinite; as for psnr

_RATE = 24  # XPSNR's and VMAF's motion terms look at neighbouring frames; below 32 the rate itself is not used
_TO_YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp,format=yuv444p"
_XPSNR_LINE = re.compile(r"XPSNR\s+y: *(-?[\d.]+|inf)")


@checked
@metric(
    range=(0.0, 100.0),
    higher_is_better=True,
    definition=f"VMAF of the luma, model {VMAF_MODEL}; mean over frames. Identical videos are near 100, not at it",
    source="Netflix VMAF, libvmaf in ffmpeg",
)
def vmaf(dense: Frames, sparse: Frames) -> float:
    """VMAF of the sparse video's luma with the dense one as reference, in [0, 100].

    It weighs lost and added detail: a change of colour or of a flat area's brightness hardly counts (flat black
    against flat white is 97), so don't rely on it alone.

    Raises:
        MetricUnavailable: there is no ffmpeg, its build lacks libvmaf, or a side is under 32 pixels.
    """
    return _of_frames("vmaf", dense, sparse)


@checked
@metric(
    unit="dB",
    range=(-math.inf, XPSNR_CAP_DB),  # perceptual weights can lift the error above MAX
    higher_is_better=True,
    source="Helmrich et al. 2020, doi:10.1109/ICASSP40776.2020.9054089; ffmpeg's xpsnr filter",
)
def xpsnr(dense: Frames, sparse: Frames) -> float:
    """Extended perceptually weighted PSNR of the luma plane (ffmpeg's `y`), dense as reference, capped at 100 dB.

    Raises:
        MetricUnavailable: there is no ffmpeg, or its build lacks the filter (ffmpeg 7.1 and later have it).
    """
    return _of_frames("xpsnr", dense, sparse)


_THREADS = min(4, os.cpu_count() or 1)
FILTERS = {
    "vmaf": f"libvmaf=model=version={VMAF_MODEL}:n_threads={_THREADS}:log_fmt=json:log_path=vmaf.json",
    "xpsnr": "xpsnr",
}
"""The filters by metric, each with the sparse video as its first input and the dense one as its second."""


def compute_on_files(
    dense: VideoFile, sparse: VideoFile, names: Sequence[str], num_frames: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Compute those of `FILTERS` that are named, on the first frames of two files of one size, paired in order.

    Values by name, and the reason of each that can't be computed here, as from `compute_available`.
    """
    values: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            _check(name, (dense.height, dense.width))
        except MetricUnavailable as error:
            unavailable[name] = str(error)
    computed = [name for name in names if name not in unavailable]
    if not computed:
        return values, unavailable
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(file.path.open("rb")) for file in (dense, sparse)]
        # A rate before an input gives its frames the times 0, 1, 2, ... of it: frames are paired by their number.
        arguments = [part for file in opened for part in ("-r", f"{dense.fps:.6f}", *ffmpeg.source(file))]
        splits = "".join(
            f"[{number}:V:0]trim=end_frame={num_frames}"
            + (f",crop={file.width}:{file.height}:0:0:exact=1" if file.is_padded else "")
            + f",split={len(computed)}{''.join(f'[{side}_{name}]' for name in computed)};"
            for number, (side, file) in enumerate((("dense", dense), ("sparse", sparse)))
        )
        filters = ";".join(f"[sparse_{name}][dense_{name}]{FILTERS[name]}[{name}]" for name in computed)
        outputs = [part for name in computed for part in ("-map", f"[{name}]", "-f", "null", "-")]
        arguments += ["-filter_complex", splits + filters, *outputs]
        return _run(arguments, computed, f"{dense.path} and {sparse.path}", files=opened), unavailable


def _of_frames(name: str, dense: Frames, sparse: Frames) -> float:
    height, width = dense.shape[1:3]
    _check(name, (height, width))
    graph = (
        f"[0:v]split[both][again];[both]crop={width}:{height}:0:0,{_TO_YUV}[dense];"
        f"[again]crop={width}:{height}:0:{height},{_TO_YUV}[sparse];[sparse][dense]{FILTERS[name]}"
    )
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", str(_RATE), "-i", "pipe:0")
    arguments = (*source, "-filter_complex", graph, "-f", "null", "-")
    stacked = (np.ascontiguousarray(frame).data for pair in zip(dense, sparse, strict=True) for frame in pair)
    return _run(arguments, (name,), f"{len(dense)} frames of {height}x{width}", feed=stacked)[name]


def _check(name: str, size: tuple[int, int]) -> None:
    """Raise MetricUnavailable where ffmpeg or its filter is missing, or frames are too small."""
    if name == "vmaf":
        check_min_side(name, size, VMAF_MIN_SIDE)
    filter_name = FILTERS[name].partition("=")[0]
    binary = ffmpeg.executable()
    if binary is None:
        raise MetricUnavailable(
            f"{filter_name} needs ffmpeg; pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to a binary"
        )
    if filter_name not in ffmpeg.filters(binary):
        raise MetricUnavailable(
            f"{binary} was built without the filter {filter_name}; pip install --upgrade imageio-ffmpeg, "
            "or set IMAGEIO_FFMPEG_EXE to a build that has it"
        )


def _run(
    arguments: Iterable[str],
    names: Sequence[str],
    what: str,
    *,
    feed: Iterable[memoryview] | None = None,
    files: Sequence[IO[bytes]] = (),
) -> dict[str, float]:
    """Run ffmpeg with the filters of these metrics, and return their values."""
    with scratch_folder() as folder:
        done = ffmpeg.run(ffmpeg.executable() or "ffmpeg", arguments, feed=feed, folder=folder, files=files)
        if done.status != 0:
            filters = " and ".join(FILTERS[name].partition("=")[0] for name in names)
            raise MetricError(f"ffmpeg's {filters} failed on {what}: {done.reason}")
        readers = {"vmaf": lambda: _vmaf(folder / "vmaf.json"), "xpsnr": lambda: _xpsnr(done.log)}
        return {name: readers[name]() for name in names}


def _vmaf(log: Path) -> float:
    return float(json.loads(log.read_text(encoding="utf-8"))["pooled_metrics"]["vmaf"]["mean"])


def _xpsnr(log: str) -> float:
    found = _XPSNR_LINE.findall(log)
    if not found:
        raise MetricError("ffmpeg's xpsnr filter printed no result; install a newer imageio-ffmpeg")
    value = float(found[-1])
    return XPSNR_CAP_DB if math.isinf(value) else min(XPSNR_CAP_DB, value)
