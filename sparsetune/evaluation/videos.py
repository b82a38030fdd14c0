"""Metrics of video files, dense against sparse, without a model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparsetune.errors import VideoError
from sparsetune.metrics import BASE_METRICS, Gate, GateResult, Summary, Verdict, score_prompts, summarize
from sparsetune.metrics import verdict as verdict_of
from sparsetune.metrics.registry import compute_available, get, own_names
from sparsetune.video import Video, read_video

Align = Literal["strict", "shortest"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of one frame each
LOSSY_NOTE = (
    "computed on decoded video files, so lossy encoding of either side counts as error; "
    "`sparsetune eval` computes the same metrics before any encoding"
)


@dataclass(frozen=True)
class VideoPair:
    """Two compared files and their metrics."""

    name: str
    dense: str
    sparse: str
    size: tuple[int, int]  # (height, width) in pixels
    fps: float
    num_frames: int  # compared
    num_frames_dense: int
    num_frames_sparse: int
    metrics: dict[str, float]
    unavailable: dict[str, str]  # reason for each metric without a value


@dataclass(frozen=True)
class VideoComparison:
    """All pairs with score, gate and statistics, which are over the pairs that have the metric."""

    pairs: tuple[VideoPair, ...]
    statistics: dict[str, Summary]
    score: int
    verdict: Verdict
    gate: GateResult
    align: Align
    note: str = LOSSY_NOTE

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "align": self.align,
            "note": self.note,
            "pairs": [{**asdict(pair), "size": list(pair.size)} for pair in self.pairs],
            "statistics": {name: asdict(summary) for name, summary in self.statistics.items()},
            "overall_score": self.score,
            "verdict": self.verdict,
            "gate": self.gate.to_dict(),
        }


def compare_videos(
    dense: Path,
    sparse: Path,
    *,
    names: Sequence[str],
    gate: Gate,
    align: Align = "strict",
    on_pair: Callable[[int, int, VideoPair], None] | None = None,
) -> VideoComparison:
    """Compare two video or image files, or all equally named videos, or else images, of two folders.

    Metrics that score and gate need and those that a user registered are always computed, besides `names`. `align`
    `shortest` compares as many frames as the shorter video has. `on_pair` is called after each pair with its number
    from 1, the number of pairs and the pair.
    """
    wanted = known_metrics(names, gate)
    found = _pairs(dense, sparse)
    compared: list[VideoPair] = []
    for number, (left, right) in enumerate(found, start=1):
        compared.append(_compare(left, right, wanted, align))
        if on_pair is not None:
            on_pair(number, len(found), compared[-1])
    rows = [pair.metrics for pair in compared]
    values = {name: [row[name] for row in rows if name in row] for name in wanted}
    statistics = {name: summarize(column) for name, column in values.items() if column}
    total = score_prompts(rows)
    return VideoComparison(tuple(compared), statistics, total, verdict_of(total), gate.check(rows), align)


def known_metrics(names: Sequence[str], gate: Gate) -> tuple[str, ...]:
    """Add those that score and gate need and a user's own; an unknown one fails before anything is computed."""
    wanted = (*BASE_METRICS, *gate.metrics, *names, *own_names())
    return tuple(dict.fromkeys(get(name).name for name in wanted))


def _compare(dense: Path, sparse: Path, names: Sequence[str], align: Align) -> VideoPair:
    left, right = read_video(dense), read_video(sparse)
    _check_match(dense, left, sparse, right, align)
    count = min(len(left.frames), len(right.frames))
    values, unavailable = compute_available(left.frames[:count], right.frames[:count], names)
    _, height, width, _ = left.frames.shape
    counts = (count, len(left.frames), len(right.frames))
    return VideoPair(dense.name, str(dense), str(sparse), (height, width), left.fps, *counts, values, unavailable)


def _check_match(dense: Path, left: Video, sparse: Path, right: Video, align: Align) -> None:
    sizes = [f"{video.frames.shape[2]}x{video.frames.shape[1]} pixels" for video in (left, right)]
    rates = [f"{video.fps:g} fps" for video in (left, right)]
    counts = [f"{len(video.frames)} frames" for video in (left, right)]
    if sizes[0] != sizes[1]:
        what, values = "size", sizes
    elif not math.isclose(left.fps, right.fps, rel_tol=1e-3):
        what, values = "frame rate", rates
    elif align == "strict" and counts[0] != counts[1]:
        what, values = "number of frames (or use --align shortest)", counts
    else:
        return
    raise VideoError(f"videos must have the same {what}, got {values[0]} in {dense} and {values[1]} in {sparse}")


def _pairs(dense: Path, sparse: Path) -> tuple[tuple[Path, Path], ...]:
    for path in (dense, sparse):
        if not path.exists():
            raise VideoError(f"no video file or folder at {path}")
    if dense.is_dir() != sparse.is_dir():
        kinds = ["a folder" if path.is_dir() else "a file" for path in (dense, sparse)]
        raise VideoError(f"pass two files or two folders; {dense} is {kinds[0]} and {sparse} {kinds[1]}")
    if not dense.is_dir():
        return ((dense, sparse),)
    for suffixes in (VIDEO_SUFFIXES, IMAGE_SUFFIXES):
        left, right = _files(dense, suffixes), _files(sparse, suffixes)
        if left or right:
            break
    else:
        raise VideoError(f"no videos or images in {dense} and {sparse}")
    if left.keys() != right.keys():
        lacks = [
            f"{folder} lacks {', '.join(sorted(names)[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for folder, names in ((sparse, left.keys() - right.keys()), (dense, right.keys() - left.keys()))
            if names
        ]
        raise VideoError(f"the folders must hold videos of the same names; {' and '.join(lacks)}")
    return tuple((left[name], right[name]) for name in left)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    return {path.name: path for path in files if not path.name.startswith(".")}
