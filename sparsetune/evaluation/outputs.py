"""The folder that an evaluation writes: result, report, videos, stills."""

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sparsetune.evaluation.prompt import Frames, Pair
from sparsetune.evaluation.result import PromptRow
from sparsetune.files import atomic_path
from sparsetune.video import save_png, side_by_side, write_video

_OURS = re.compile(r"prompt_\d+_((dense|sparse|compare)\.mp4|frame_\d+\.png)")


@dataclass(frozen=True)
class Moment:
    """One frame of a prompt's two videos; arrays of shape (1, height, width, 3), RGB uint8."""

    index: int
    frame: int
    dense: Frames
    sparse: Frames

    @classmethod
    def of(cls, index: int, frame: int, pair: Pair) -> "Moment":
        """Copy a frame out of a pair, so that the videos can be let go."""
        cut = slice(frame, frame + 1)
        return cls(index, frame, pair.dense[cut].copy(), pair.sparse[cut].copy())


@dataclass(frozen=True)
class OutputFolder:
    """Names and writes the files of one evaluation.

    Args:
        folder: where they go.
        stem: of the result's name: the model family's.
        tuned: whether a checkpoint is judged, or the default thresholds.
        fps: frames a second of the videos.
    """

    folder: Path
    stem: str
    tuned: bool
    fps: int

    @property
    def result_path(self) -> Path:
        """The result's JSON."""
        return self.folder / f"{self.stem}_accuracy_{'tuned' if self.tuned else 'default'}.json"

    @property
    def report_path(self) -> Path:
        """The report."""
        return self.folder / "report.md"

    def check_writable(self) -> None:
        """Find out before anything is rendered whether files can be written.

        Raises:
            SparsetuneError: they can't.
        """
        probe = self.folder / ".sparsetune-writable"
        with atomic_path(probe):
            pass
        probe.unlink(missing_ok=True)

    def write_videos(self, index: int, pair: Pair, *, difference: bool) -> dict[str, Path]:
        """Write a prompt's dense, sparse and side-by-side videos.

        Args:
            index: the prompt's, from 0.
            pair: its videos.
            difference: give the side-by-side video a third pane with the difference amplified.

        Returns:
            The files, under `dense`, `sparse` and `compare`.

        Raises:
            VideoError: encoding failed.
            SparsetuneError: the folder can't be written.
        """
        paths = {kind: self._video_path(index, kind) for kind in ("dense", "sparse", "compare")}
        beside = side_by_side(pair.dense, pair.sparse, difference=difference)
        with ThreadPoolExecutor(len(paths)) as pool:  # the encoder is a process of its own: three run at once
            videos = zip(paths.values(), (pair.dense, pair.sparse, beside), strict=True)
            encoding = [pool.submit(write_video, path, frames, self.fps) for path, frames in videos]
            for video in encoding:
                video.result()
        return paths

    def keep_videos(self, index: int, videos: Mapping[str, Path | bytes]) -> dict[str, Path]:
        """Give a prompt's video files by kind; those whose contents a worker sent are written first.

        Raises:
            SparsetuneError: the folder can't be written.
        """
        kept = {}
        for kind, video in videos.items():
            kept[kind] = video if isinstance(video, Path) else self._video_path(index, kind)
            if isinstance(video, bytes):
                with atomic_path(kept[kind]) as temporary:
                    temporary.write_bytes(video)
        return kept

    def _video_path(self, index: int, kind: str) -> Path:
        return self.folder / "videos" / f"prompt_{index}_{kind}.mp4"

    def remove_stale(self, written: Collection[Path]) -> None:
        """Remove the stills, and the videos where there are new ones, that an earlier evaluation left here."""
        kinds = {folder for folder in ("videos", "stills") if any(path.parent.name == folder for path in written)}
        for folder in sorted(kinds):
            for path in (self.folder / folder).glob("prompt_*"):
                if path not in written and _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def write_still(self, moment: Moment) -> Path:
        """Write dense, sparse and difference of one frame beside each other as a PNG."""
        path = self.folder / "stills" / f"prompt_{moment.index}_frame_{moment.frame}.png"
        save_png(path, side_by_side(moment.dense, moment.sparse, difference=True)[0])
        return path


def telling_prompts(rows: Sequence[PromptRow]) -> tuple[int, ...]:
    """Choose the prompts to show: the worst by PSNR and the median one (the lower of two), once where they are one.

    Returns:
        Their indices, the worst first; none when no prompt has a PSNR.
    """
    ranked = sorted((row.psnr, row.index) for row in rows if row.psnr is not None)
    if not ranked:
        return ()
    worst, median = ranked[0][1], ranked[(len(ranked) - 1) // 2][1]
    return (worst,) if worst == median else (worst, median)
