"""VMAF and XPSNR, computed by the ffmpeg binary of imageio-ffmpeg.

Frames are piped as raw RGB, each dense frame with the sparse one under it, and cropped apart again: one pipe can't
deadlock, and there are no temporary video files. Both metrics work on YUV: RGB is converted to 8-bit BT.709 (limited
range, 4:4:4) after the crop.
"""

import json
import math
import os
import re
from pathlib import Path

import numpy as np

from sparsetune import ffmpeg
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
    check_min_side("vmaf", dense, VMAF_MIN_SIDE)
    with scratch_folder() as folder:
        threads = min(4, os.cpu_count() or 1)
        options = f"model=version={VMAF_MODEL}:n_threads={threads}:log_fmt=json:log_path=vmaf.json"
        _run(f"libvmaf={options}", dense, sparse, folder)
        log = json.loads((folder / "vmaf.json").read_text(encoding="utf-8"))
    return float(log["pooled_metrics"]["vmaf"]["mean"])


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
    found = _XPSNR_LINE.findall(_run("xpsnr", dense, sparse))
    if not found:
        raise MetricError("ffmpeg's xpsnr filter printed no result; install a newer imageio-ffmpeg")
    value = float(found[-1])
    return XPSNR_CAP_DB if math.isinf(value) else min(XPSNR_CAP_DB, value)


def _run(comparison: str, dense: Frames, sparse: Frames, folder: Path | None = None) -> str:
    filter_name = comparison.partition("=")[0]
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
    height, width = dense.shape[1:3]
    graph = (
        f"[0:v]split[both][again];[both]crop={width}:{height}:0:0,{_TO_YUV}[dense];"
        f"[again]crop={width}:{height}:0:{height},{_TO_YUV}[sparse];[sparse][dense]{comparison}"
    )
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", str(_RATE), "-i", "pipe:0")
    arguments = (*source, "-filter_complex", graph, "-f", "null", "-")
    stacked = (np.ascontiguousarray(frame).data for pair in zip(dense, sparse, strict=True) for frame in pair)
    done = ffmpeg.run(binary, arguments, feed=stacked, folder=folder)
    if done.status != 0:
        raise MetricError(f"ffmpeg's {filter_name} failed on {len(dense)} frames of {height}x{width}: {done.reason}")
    return done.log
