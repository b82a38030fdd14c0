"""The comparison of video files, dense against sparse, with no model at hand."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparsetune.errors import VideoError
from sparsetune.metrics import BASE_METRICS, Gate, GateResult, Summary, Verdict, summarize
from sparsetune.metrics import score as score_of
from sparsetune.metrics import verdict as verdict_of
from sparsetune.metrics.registry import compute_available, get, own_names
from sparsetune.video import Video, read_video

Align = Literal["strict", "shortest"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
"""Files that count as videos when a folder is compared."""

LOSSY_NOTE = (
    "taken on decoded video files: lossy encoding of either side counts as error; "
    "an evaluation takes the same metrics before any encoding"
)
"""What every result of this module says about its own figures."""


@dataclass(frozen=True)
class VideoPair:
    """Two compared files and their metrics.

    `num_frames` were compared, of `num_frames_dense` and `num_frames_sparse`; `unavailable` gives for each
    metric without a value the reason. `size` is (height, width) in pixels.
    """

    name: str
    dense: str
    sparse: str
    size: tuple[int, int]
    fps: float
    num_frames: int
    num_frames_dense: int
    num_frames_sparse: int
    metrics: dict[str, float]
    unavailable: dict[str, str]


@dataclass(frozen=True)
class VideoComparison:
    """All pairs with their statistics, score and gate. Statistics are over the pairs that have the metric."""

    pairs: tuple[VideoPair, ...]
    statistics: dict[str, Summary]
    score: int
    verdict: Verdict
    gate: GateResult
    align: Align
    note: str = LOSSY_NOTE

    def to_dict(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "schema_version": 1,
            "align": self.align,
            "note": self.note,
            "pairs": [{**asdict(pair), "size": list(pair.size)} for pair in self.pairs],
            "statistics": {name: summary.to_dict() for name, summary in self.statistics.items()},
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
    """Compare two video files, or all equally named ones of two folders.

    Args:
        dense: a file or a folder; the reference.
        sparse: likewise.
        names: metrics to take; those that score and gate need and those that a user registered are taken as well.
        gate: judges the result.
        align: `strict` wants equal frame counts, `shortest` compares as many frames as the shorter one has.
        on_pair: called after each pair with its number from 1, the number of pairs and the pair.

    Raises:
        VideoError: a path is missing, the folders' names differ, a file can't be decoded, or the two of a pair
            differ in size, frame rate or (unless aligned) frame count.
        MetricError: a metric is unknown or failed.
    """
    wanted = tuple(dict.fromkeys((*BASE_METRICS, *gate.metrics, *names, *own_names())))
    for name in wanted:
        get(name)  # an unknown one fails before any file is decoded
    found = _pairs(dense, sparse)
    compared: list[VideoPair] = []
    for number, (left, right) in enumerate(found, start=1):
        compared.append(_compare(left, right, wanted, align))
        if on_pair is not None:
            on_pair(number, len(found), compared[-1])
    rows = [pair.metrics for pair in compared]
    values = {name: [row[name] for row in rows if name in row] for name in wanted}
    statistics = {name: summarize(column) for name, column in values.items() if column}
    total = score_of(*(statistics[name].mean for name in ("frame_cosine", "psnr", "frame_l1")))
    return VideoComparison(tuple(compared), statistics, total, verdict_of(total), gate.check(rows), align)


def _compare(dense: Path, sparse: Path, names: Sequence[str], align: Align) -> VideoPair:
    left, right = read_video(dense), read_video(sparse)
    _check_match(dense, left, sparse, right, align)
    count = min(len(left.frames), len(right.frames))
    values, unavailable = compute_available(left.frames[:count], right.frames[:count], names)
    height, width = left.frames.shape[1:3]
    return VideoPair(
        name=dense.name,
        dense=str(dense),
        sparse=str(sparse),
        size=(height, width),
        fps=left.fps,
        num_frames=count,
        num_frames_dense=len(left.frames),
        num_frames_sparse=len(right.frames),
        metrics=values,
        unavailable=unavailable,
    )


def _check_match(dense: Path, left: Video, sparse: Path, right: Video, align: Align) -> None:
    if left.frames.shape[1:] != right.frames.shape[1:]:
        raise _differ("size", dense, _size(left), sparse, _size(right), "render both at one size")
    if abs(left.fps - right.fps) > 1e-3 * max(left.fps, right.fps):
        raise _differ("frame rate", dense, f"{left.fps:g} fps", sparse, f"{right.fps:g} fps", "write both at one rate")
    counts = len(left.frames), len(right.frames)
    if counts[0] != counts[1] and align == "strict":
        remedy = "render equally many, or compare only the frames that both have with --align shortest"
        raise _differ("number of frames", dense, f"{counts[0]} frames", sparse, f"{counts[1]} frames", remedy)


def _differ(what: str, dense: Path, left: str, sparse: Path, right: str, remedy: str) -> VideoError:
    return VideoError(
        f"two compared videos must have the same {what}, but {dense} has {left} and {sparse} {right}; {remedy}"
    )


def _size(video: Video) -> str:
    height, width = video.frames.shape[1:3]
    return f"{width}x{height} pixels"


def _pairs(dense: Path, sparse: Path) -> tuple[tuple[Path, Path], ...]:
    for path in (dense, sparse):
        if not path.exists():
            raise VideoError(
                f"there must be a video file or a folder of them at {path}, but there is none; mend the path"
            )
    if dense.is_dir() != sparse.is_dir():
        kinds = ["a folder" if path.is_dir() else "a file" for path in (dense, sparse)]
        raise VideoError(
            f"two files or two folders can be compared, but {dense} is {kinds[0]} and {sparse} {kinds[1]}; "
            "give both of one kind"
        )
    if not dense.is_dir():
        return ((dense, sparse),)
    left, right = _videos(dense), _videos(sparse)
    if left.keys() != right.keys() or not left:
        raise VideoError(_unmatched(dense, set(left), sparse, set(right)))
    return tuple((left[name], right[name]) for name in left)


def _videos(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    return {path.name: path for path in files if not path.name.startswith(".")}


def _unmatched(dense: Path, left: set[str], sparse: Path, right: set[str]) -> str:
    if not left and not right:
        return f"folders of videos must hold some, but {dense} and {sparse} hold none; give folders with mp4 files"
    lacks = [
        f"{folder} lacks {', '.join(sorted(names)[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for folder, names in ((sparse, left - right), (dense, right - left))
        if names
    ]
    return f"two folders must hold equally named videos, but {' and '.join(lacks)}; name them alike or compare files"
