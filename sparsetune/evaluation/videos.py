"""Metrics of video files, dense against sparse, without a model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparsetune import ffmpeg
from sparsetune.decoding import FLAGS, Decoder, VideoFile, binary, open_video
from sparsetune.errors import VideoError
from sparsetune.evaluation.pairing import pairs, shown
from sparsetune.metrics import BASE_METRICS, Gate, GateResult, Measuring, Summary, Verdict, score_prompts, summarize
from sparsetune.metrics import verdict as verdict_of
from sparsetune.metrics.ffmpeg import FILTERS, compute_on_files
from sparsetune.metrics.registry import get, own_names

Align = Literal["strict", "shortest"]

NO_BOUNDS = Gate(min_frame_cosine=-1.0, min_psnr=-1.0, min_psnr_worst=None, min_psnr_frame=None)
"""The gate that every video meets, to be given bounds."""

LOSSY_NOTE = (
    "computed on decoded files: lossy encoding counts, and can raise the values as well as lower them; "
    "`sparsetune eval` computes the same metrics before any encoding"
)
_PROPERTIES = {
    "matrix": "colour matrix",
    "primaries": "colour primaries",
    "transfer": "transfer function",
    "range": "colour range",
    "fps": "frame rate",
    "is_variable": "variable frame rate",
    "rotation": "rotation",
    "has_alpha": "alpha channel",
    "bit_depth": "bit depth",
    "pixel_format": "pixel format",
}
"""What two files should have in common, by its name in `conversion`."""


@dataclass(frozen=True)
class VideoPair:
    """Two compared files and their metrics."""

    name: str
    dense: str
    sparse: str
    size: tuple[int, int]  # (height, width) in pixels
    fps: float  # of the dense file
    num_frames: int  # compared
    num_frames_dense: int
    num_frames_sparse: int
    metrics: dict[str, float]
    unavailable: dict[str, str]  # reason for each metric without a value
    conversion: dict[str, Any]  # how the files are stored, and how they were decoded
    notes: tuple[str, ...]  # what differs between the files besides their pixels


@dataclass(frozen=True)
class VideoComparison:
    """All pairs with score and statistics, over the pairs that have the metric; `gate` is None without one."""

    pairs: tuple[VideoPair, ...]
    statistics: dict[str, Summary]
    score: int
    verdict: Verdict
    gate: GateResult | None
    align: Align
    note: str = LOSSY_NOTE

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "align": self.align,
            "note": self.note,
            "pairs": [{**asdict(pair), "size": list(pair.size), "notes": list(pair.notes)} for pair in self.pairs],
            "statistics": {name: asdict(summary) for name, summary in self.statistics.items()},
            "overall_score": self.score,
            "verdict": self.verdict,
            "gate": None if self.gate is None else self.gate.to_dict(),
        }


def compare_videos(
    dense: Path,
    sparse: Path,
    *,
    names: Sequence[str],
    gate: Gate | None = None,
    align: Align = "strict",
    strict: bool = False,
    on_pair: Callable[[int, int, VideoPair], None] | None = None,
) -> VideoComparison:
    """Compare two video files, or all pairs of two folders (see `pairing.pairs`).

    Frames are decoded and measured some at a time. A metric of yours that isn't `pooled` needs whole videos in memory.

    Args:
        dense: a file or a folder.
        sparse: a file or a folder, which may be the same.
        names: metrics, besides those that the score and the gate need and those that a user registered.
        gate: bounds to check.
        align: `shortest` compares as many frames as the shorter video has; `strict` raises where they differ.
        strict: raise where colour tags, frame rate, rotation, alpha or bit depth differ, instead of a note.
        on_pair: called after each pair with its number from 1, the number of pairs and the pair.
    """
    wanted = known_metrics(names, gate)
    found = pairs(dense, sparse)
    compared: list[VideoPair] = []
    for number, (name, left, right) in enumerate(found, start=1):
        compared.append(_compare(name, left, right, wanted, align, strict))
        if on_pair is not None:
            on_pair(number, len(found), compared[-1])
    rows = [pair.metrics for pair in compared]
    values = {name: [row[name] for row in rows if name in row] for name in wanted}
    statistics = {name: summarize(column) for name, column in values.items() if column}
    total = score_prompts(rows)
    checked = None if gate is None else gate.check(rows)
    return VideoComparison(tuple(compared), statistics, total, verdict_of(total), checked, align)


def known_metrics(names: Sequence[str], gate: Gate | None) -> tuple[str, ...]:
    """Add those that score and gate need and a user's own; an unknown one fails before anything is computed."""
    wanted = (*BASE_METRICS, *(gate.metrics if gate else ()), *names, *own_names())
    return tuple(dict.fromkeys(get(name).name for name in wanted))


def _compare(name: str, dense: Path, sparse: Path, names: Sequence[str], align: Align, strict: bool) -> VideoPair:
    left, right = open_video(dense), open_video(sparse)
    _check_equal("size", [f"{file.width}x{file.height} pixels" for file in (left, right)], dense, sparse)
    _differences(left, right, strict)
    with Decoder(left, max(left.bit_depth, right.bit_depth)) as first, Decoder(right, first.bit_depth) as second:
        measuring, num_frames = _measure(first, second, [one for one in names if one not in FILTERS])
        left, right = first.finish(), second.finish()
    counts = first.num_frames, second.num_frames
    if align == "strict":
        texts = [f"{count} frames" for count in counts]
        _check_equal("number of frames (or use --align shortest)", texts, dense, sparse)
    notes = _differences(left, right, strict)
    if dense.samefile(sparse):
        notes = (*notes, "dense and sparse are the same file")
    values, unavailable = measuring.values()
    of_files = compute_on_files(left, right, [one for one in names if one in FILTERS], num_frames)
    values |= of_files[0]
    unavailable |= of_files[1]
    return VideoPair(
        name,
        shown(dense),
        shown(sparse),
        (left.height, left.width),
        left.fps,
        num_frames,
        *counts,
        metrics={one: values[one] for one in names if one in values},
        unavailable={one: unavailable[one] for one in names if one in unavailable},
        conversion={
            "dense": _stored(left),
            "sparse": _stored(right),
            "to": "rgb24" if first.bit_depth <= 8 else "rgb48",
            "flags": FLAGS,
            "ffmpeg": ffmpeg.version(binary()),
        },
        notes=notes,
    )


def _measure(dense: Decoder, sparse: Decoder, names: Sequence[str]) -> tuple[Measuring, int]:
    """Measure the frames that both have, and return how many there were."""
    measuring, num_frames, step = Measuring(names), 0, min(dense.slab, sparse.slab)
    while True:
        left, right = dense.read(step), sparse.read(step)
        count = min(len(left), len(right))
        if count:
            measuring.add(left[:count], right[:count])
            num_frames += count
        if count < step:
            return measuring, num_frames


def _check_equal(what: str, values: Sequence[str], dense: Path, sparse: Path) -> None:
    if values[0] != values[1]:
        raise VideoError(
            f"videos must have the same {what}, got {values[0]} in {shown(dense)} and {values[1]} in {shown(sparse)}"
        )


def _stored(file: VideoFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in (*_PROPERTIES, "chroma_location")}


def _differences(dense: VideoFile, sparse: VideoFile, strict: bool) -> tuple[str, ...]:
    """Name the properties that differ between two files; VideoError with `strict`."""
    left, right = _stored(dense), _stored(sparse)
    differing = [
        f"{what} ({_text(left[name])} and {_text(right[name])})"
        for name, what in _PROPERTIES.items()
        if left[name] != right[name]
    ]
    if differing and strict:
        raise VideoError(
            f"{shown(dense.path)} and {shown(sparse.path)} differ in {', '.join(differing)}; "
            "encode both in one way, or omit --strict"
        )
    return (f"dense and sparse differ in {', '.join(differing)}",) if differing else ()


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
